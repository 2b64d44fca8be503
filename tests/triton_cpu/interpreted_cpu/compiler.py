"""The compiler: refuses to compile."""

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class NoCompiler(BaseBackend):
    """For the table entry only; a kernel that gets here was not interpreted."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> Any:
        raise NotImplementedError("nothing compiles for this backend: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict, options: Any, language: Any) -> None:
        raise NotImplementedError("nothing compiles for this backend: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """There are none."""

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
