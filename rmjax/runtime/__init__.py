"""What a program runs on: its options, mesh, processes, compilation, memory, files."""
