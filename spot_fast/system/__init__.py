"""What the machine and the terminal are like: devices, threads, signals, optional packages."""
