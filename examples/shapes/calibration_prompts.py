"""Prompts that the demo model's heads are measured on: captions as in training, none that `eval` asks for.

    python examples/shapes/calibration_prompts.py > examples/shapes/calibration.txt
    vllm-kvcompress calibrate examples/shapes/model -o examples/shapes/model/head_profile.json \\
        --prompts examples/shapes/calibration.txt --budgets 0.5,1/3,0.25,0.2,1/6,1/8,0.1
"""

from itertools import count, islice

from vllm_kvcompress.eval.prompts import CATEGORIES, all_prompts
from vllm_kvcompress.eval.scenes import sample_pair

NUMBER = 48
STREAM = 5  # beside training's streams and the held-out scenes'

if __name__ == "__main__":
    asked = {prompt.text for category in CATEGORIES for prompt in all_prompts(category)}
    drawn = (sample_pair((STREAM, n))[1].text for n in count())
    print("\n".join(islice((text for text in drawn if text not in asked), NUMBER)))
