"""What a program runs on: mesh, processes, compilation, memory, files."""
