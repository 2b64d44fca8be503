"""Loggers that vLLM's own logging configuration shows."""

from logging import Logger

from vllm.logger import init_logger


def logger_for(module: str) -> Logger:
    """The logger of one of this package's modules.

    vLLM configures the loggers below ``vllm``, and only those: a message under another name would not
    reach the server's log.
    """
    return init_logger(module.replace("vllm_kvcompress", "vllm.kvcompress", 1))
