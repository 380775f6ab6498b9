"""Ask the server that examples/serve.sh started, streaming: `python examples/client.py [URL]`."""

import argparse
import sys

from farspan.needle.tasks import make_sample
from openai import APIConnectionError, APIStatusError, OpenAI

# Long enough that flex is sparse with the options of serve.sh.
PROMPT_LEN = 12288


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a server that examples/serve.sh started.")
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    url = parser.parse_args().url
    client = OpenAI(base_url=url, api_key="none")
    sample = make_sample("niah_single", PROMPT_LEN, seed=1)
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
    except APIStatusError as error:
        sys.exit(f"The server at {url} refuses the request: {error.message}")
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print(f"\nexpected: {' '.join(sample.answers)}")


if __name__ == "__main__":
    main()
