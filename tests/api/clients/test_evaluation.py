"""lm-eval, guidellm and aiperf by the commands that their users type; each is skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess

import httpx
import pytest
from api.clients.served import KEY, served

pytestmark = pytest.mark.slow

TASK = """
task: arithmetic
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as server:
        yield server


def run(*words, folder):
    """Raises unless the command is there and ends well."""
    command = shutil.which(words[0])
    if command is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run([command, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_lm_eval(server, tmp_path, monkeypatch, tokenizer):
    """A task of its own: log-probabilities of the choices behind each question, sent as token ids that lm-eval gets
    from the model's folder, or from the server.
    """
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} + 1 =", "choices": [f" {i + 1}", f" {i + 7}"]} for i in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "arithmetic.yaml").write_text(TASK.format(data=data))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(server.model),
        "tokenizer_backend": tokenizer,
        "num_concurrent": "4",
        "max_length": "512",
    }
    output = run(
        *("lm_eval", "--model", "local-completions", "--tasks", "arithmetic", "--include_path", str(tmp_path)),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--batch_size", "4", "--output_path", str(tmp_path / "results")),
        folder=tmp_path,
    )
    assert "arithmetic" in output
    (found,) = (tmp_path / "results").rglob("results*.json")
    assert 0 <= json.loads(found.read_text())["results"]["arithmetic"]["acc,none"] <= 1


def finished(server):
    """Samples that the server has answered to their end."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("quire_request_success_total{"))


def test_guidellm(server, tmp_path):
    before = finished(server)
    run(
        *("guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model=tiny,api_key={KEY}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=8"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--tokenizer", f"kind=hf_auto,model={server.model}"),
        folder=tmp_path,
    )
    assert finished(server) - before >= 8


def test_aiperf(server, tmp_path):
    before = finished(server)
    run(
        *("aiperf", "profile", "--model", "tiny", "--tokenizer", str(server.model), "--url", server.url),
        *("--endpoint-type", "chat", "--streaming", "--concurrency", "2", "--request-count", "8"),
        *("--api-key", KEY, "--synthetic-input-tokens-mean", "16", "--output-tokens-mean", "8", "--ui", "none"),
        folder=tmp_path,
    )
    assert finished(server) - before >= 8
