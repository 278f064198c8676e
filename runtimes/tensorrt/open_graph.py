"""Opens one graph and ends: `python -m edgeomni.runtimes.tensorrt.open_graph FILE`, for `edgeomni verify --load`.

The graphs of a TensorRT bundle are ONNX, and every machine can open those with ONNX Runtime; engines are tried where
they run.
"""

from __future__ import annotations

import sys

from edgeomni.runtimes.onnxruntime.open_graph import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
