"""Work on several devices: the processes, and the rows that one of each machine reads for all."""
