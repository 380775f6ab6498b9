"""One question to many long documents: `python examples/long_documents.py "What …?" A.txt B.txt --model MODEL`.

All prompts are one batch, prefilled sparsely where that is faster and exactly elsewhere. Without documents, generated
ones are used, about which the small bundled model can tell something.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from farspan.command import run_command
from farspan.engine_ext.errors import ConfigError
from farspan.metrics import EXTENSION, read_selection
from farspan.needle import model_dir
from farspan.needle.tasks import make_sample
from vllm import LLM, SamplingParams


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask every document the same question.")
    parser.add_argument("question", nargs="?", help="asked after the text of each document")
    parser.add_argument("documents", nargs="*", type=Path, help="text files in UTF-8")
    parser.add_argument("--model", default=str(model_dir()), help="a folder or a Hugging Face name")
    parser.add_argument("--gamma", type=float, default=0.95, help="attention mass that sparse prefill keeps")
    parser.add_argument("--max-model-len", type=int, default=16384, help="tokens of prompt and answer")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--always-sparse", action="store_true", help="also where dense prefill would be faster")
    parser.add_argument("--generated", type=int, default=3, help="documents that are generated where none is named")
    parser.add_argument("--generated-len", type=int, default=4096, help="tokens of each")
    return parser.parse_args()


def read_prompts(llm: LLM, question: str, documents: list[Path]) -> list[Any]:
    """A prompt for each document, through the chat template where the model has one."""
    tokenizer = llm.get_tokenizer()
    prompts: list[Any] = []
    for path in documents:
        try:
            text = f"{path.read_text(encoding='utf-8')}\n\n{question}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"document {path} cannot be read ({error}); name text files in UTF-8") from error
        if getattr(tokenizer, "chat_template", None):
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
            )
            prompts.append({"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)})
        else:
            prompts.append(text)
    return prompts


def main() -> None:
    arguments = parse_arguments()
    if (arguments.question is None) != (not arguments.documents):
        raise ConfigError("a question without documents; name text files after it, or leave both out")
    prefill: dict[str, Any] = {"method": "flex", "gamma": arguments.gamma}
    if arguments.always_sparse:
        prefill |= {"min_seq_len": 0, "min_chunk_len": 0}
    llm = LLM(
        arguments.model,
        attention_backend="CUSTOM",
        additional_config={"farspan": {"prefill": prefill}},
        # Adds up what was read; it costs some small launches a layer, so leave it out where nobody looks.
        worker_extension_cls=EXTENSION,
        max_model_len=arguments.max_model_len,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    if arguments.documents:
        names = [path.name for path in arguments.documents]
        prompts = read_prompts(llm, arguments.question, arguments.documents)
    else:
        samples = [make_sample("niah_multiquery", arguments.generated_len, seed) for seed in range(arguments.generated)]
        names = [f"generated {sample.seed}, expected {' '.join(sample.answers)}" for sample in samples]
        prompts = [sample.prompt for sample in samples]
        greedy.max_tokens = samples[0].max_new_tokens
    read_selection(llm, reset=True)
    # vLLM takes all of them and fills every step; documents that begin alike share what is cached.
    for name, output in zip(names, llm.generate(prompts, greedy), strict=True):
        print(f"{name} ({len(output.prompt_token_ids or ())} tokens): {output.outputs[0].text.strip()}")
    print(what_was_read(read_selection(llm, reset=True)))


def what_was_read(heads: list[dict[str, Any]]) -> str:
    """A line about the rows of `read_selection`."""
    if not heads:
        return "dense: no chunk was long enough for sparse prefill to be faster"
    density = sum(head["density"] for head in heads) / len(heads)
    # None where no chunk held 128 tokens from a multiple of 128 on: such chunks read everything.
    kept = [head["coverage_min"] for head in heads if head["coverage_min"] is not None]
    least = 100 * min(kept, default=1.0)
    return f"sparse: read {100 * density:.0f} % of the blocks, kept at least {least:.0f} % of the attention mass"


if __name__ == "__main__":
    sys.exit(run_command("examples/long_documents.py", main))
