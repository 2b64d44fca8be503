"""A Triton backend for the CPU that compiles nothing: vLLM's V2 model runner without a GPU, in tests.

Triton finds it through the entry point beside this package once the folder ``tests/triton_cpu`` is on
PYTHONPATH. Its one job is to say that it is active, so that vLLM imports Triton at all; the kernels run
in Triton's interpreter (``TRITON_INTERPRET=1``), which asks a backend for nothing.
"""
