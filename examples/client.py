"""Ask the server that examples/serve.sh started, streaming: `python examples/client.py [URL]`."""

import sys

from farspan.needle.tasks import make_sample
from openai import APIConnectionError, OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=url, api_key="none")
    sample = make_sample("niah_single", 8192, seed=1)
    try:
        stream = client.completions.create(
            model="demo",
            prompt=sample.prompt,
            max_tokens=sample.max_new_tokens,
            temperature=0.0,
            stream=True,
            extra_body={"vllm_xargs": {"farspan.gamma": 0.99}},
        )
    except APIConnectionError:
        sys.exit(f"No server answers at {url}. Start one with examples/serve.sh and wait until it says so.")
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print(f"\nexpected: {' '.join(sample.answers)}")


if __name__ == "__main__":
    main()
