"""KV-cache groups by head type. Importing the package tells vLLM's registry about its specs.

Specs reach vLLM's scheduler by pickle from the workers, so the import is the one place that every
process that sees a spec passes through.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.cache.manager import BoundedManager
from vllm_kvcompress.cache.spec import HeadTypeSpec

# The registry adds vLLM's own specs on first use, but only while it is still empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(HeadTypeSpec, BoundedManager, uniform_type_base_spec=HeadTypeSpec)
