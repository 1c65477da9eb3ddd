"""What several examples share: training, files, tables and plots."""
