"""Python clients as their users call them: a line of JSON with what they give back. ``ask.py BASE_URL``."""

import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it asks GitHub otherwise

import litellm  # noqa: E402
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper  # noqa: E402

url, prompt = sys.argv[1], "a red apple"
place = {"api_base": url, "api_key": "none"}
bare = litellm.image_generation(model="openai/janus", prompt=prompt, **place)
full = litellm.image_generation(
    model="openai/dall-e-3", prompt=prompt, size="1024x1024", quality="hd", **place
)
try:
    litellm.image_generation(model="openai/janus", prompt=prompt, n=11, **place)
    refused = None
except litellm.BadRequestError as error:
    refused = str(error)
print(
    json.dumps(
        {
            "b64_json": bare.data[0].b64_json,
            "url": full.data[0].url,
            "refused": refused,
            "langchain": DallEAPIWrapper(base_url=url, api_key="none").run(prompt),
        }
    )
)
