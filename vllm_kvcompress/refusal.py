"""What a request is refused with."""

from vllm.exceptions import VLLMValidationError


class BadParameter(VLLMValidationError):
    """A 400 that names the parameter; vLLM's exception handlers turn it into OpenAI's error shape."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message, parameter=parameter)

    def __str__(self) -> str:  # without the base class's "(parameter=...)": the answer has a field for it
        return str(self.args[0])

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self.parameter), str(self))
