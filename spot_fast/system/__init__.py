"""The machine: devices, CPU threads, signals, the terminal, optional packages."""
