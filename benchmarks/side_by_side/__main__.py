"""``python -m side_by_side``, in the folder ``benchmarks``."""

from side_by_side.cli import app

if __name__ == "__main__":
    app()
