"""The implementation of the decode step in use: plain torch, or compiled for the device at hand."""

from types import ModuleType

from vllm_kvcompress.attention import cpu, reference
from vllm_kvcompress.attention import select as torch_select
from vllm_kvcompress.config import Kernels

decode = reference.decode
select_victims = torch_select.select_victims


def use(kernels: Kernels, device_type: str) -> str:
    """Choose the kernels of this process.

    Parameters
    ----------
    kernels : str
        ``auto``, ``torch`` or ``cpu``.
    device_type : str
        torch's name of the device that the cache lives on.

    Returns
    -------
    str
        The name of what is used, for the start-up log.

    Raises
    ------
    ValueError
        If kernels for another device, or kernels that were never built, are asked for by name.
    """
    global decode, select_victims
    if kernels == "cpu" and (device_type != "cpu" or cpu.isa() is None):
        reason = "the cache is on " + device_type if device_type != "cpu" else "they were not built"
        raise ValueError(
            f"additional_config.kvcompress.kernels: cpu kernels can't be used, {reason}; set auto"
        )
    compiled = kernels != "torch" and device_type == "cpu" and cpu.isa() is not None
    module: ModuleType = cpu if compiled else reference
    decode = module.decode
    select_victims = cpu.select_victims if compiled else torch_select.select_victims
    return f"cpu ({cpu.isa()})" if compiled else "torch"
