"""Sets of runs: seeds, sweeps and sequences.  Runs `sdkit train` once for each member, in a process of its own."""
