"""A walk over the program of any JAX function, and its three uses.

A function is traced to a jaxpr in which stand-ins take the place of stored
weights; the walk evaluates it, and knows at each product which weight it meets.
`packed` runs the product on the weight as it is stored, `with_policy` replaces
it, `record` hands its operands to an observer.
"""

from lowbit_jax._walk._packed import packed as packed
from lowbit_jax._walk._policy import with_policy as with_policy
from lowbit_jax._walk._products import Product as Product
from lowbit_jax._walk._record import Observer as Observer, record as record
from lowbit_jax._walk._report import Report as Report, Row as Row
