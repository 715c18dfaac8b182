"""The server's own token counters, held against the sums of its answers' usage."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

FAMILIES = {
    "prompt_tokens": ("quire_prompt_tokens", "vllm:prompt_tokens"),
    "generation_tokens": ("quire_generation_tokens", "vllm:generation_tokens"),
}


@dataclass(frozen=True, slots=True)
class TokenCounts:
    prompt_tokens: int
    generation_tokens: int

    def __sub__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.prompt_tokens - other.prompt_tokens, self.generation_tokens - other.generation_tokens)


def read_counters(exposition: str) -> TokenCounts | None:
    """Token counters of a Prometheus text, summed over labels; None when it has none that we know."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(exposition):
        if family.type == "counter":
            totals[family.name] = sum(s.value for s in family.samples if s.name.endswith("_total"))
    found = {ours: next((totals[name] for name in names if name in totals), None) for ours, names in FAMILIES.items()}
    prompt, generation = found["prompt_tokens"], found["generation_tokens"]
    return None if prompt is None or generation is None else TokenCounts(int(prompt), int(generation))
