"""What the benches share: the machine, clocks, rows, tables, and the steps and runs that they measure."""
