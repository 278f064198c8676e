"""ggml, as llama-cpp-python's own libraries bring it: a small layer over its C interface, and graphs written on it.

library.py declares the functions and checks that the library is the one they are declared for; files.py opens GGUF
files after checking every tensor; graph.py builds and runs graphs; heads.py is the LLM's heads and embedding rows.
"""
