"""The routes, a file for each thing that is asked for. Each module has one `router`."""
