"""The snippets of the READMEs run, and do what the text beside them says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "stagedspec" / "assets"


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def run(program: str, **environment: str) -> str:
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=known | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CHECKS = {
    "README.md": "assert len(completion.tokens) == 64 and ids.shape[0] == 1",
    "stagedspec/README.md": "assert len(completion.tokens) == 64 and ids.shape[0] == 2\n"
    "assert out.sequences.shape[0] == 1 and out.stats.steps > 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", CHECKS)
def test_snippets_of_the_readme(page):
    """In the order in which they stand, with the embedded models in place of those that would be downloaded."""
    program = "\n".join(snippets(page))
    for name, folder in (("gpt2-large", "target"), ("distilgpt2", "draft")):
        program = program.replace(f'"{name}"', repr(str(ASSETS / folder)))
    assert run(f"{program}\n{CHECKS[page]}")  # what was streamed


ATTENTION = """
from torch.nn.functional import scaled_dot_product_attention as attend
q, k, v = qkv.float().view(B, N, 3, H, D).unbind(2)
old = cache[:, N : N + committed].float()
keys, values = (torch.cat((old[:, :, i], new), 1).transpose(1, 2) for i, new in ((0, k), (1, v)))
mask = torch.cat((torch.ones(B, N, committed, dtype=torch.bool), seen), 2).to(device)
expected = attend(q.transpose(1, 2), keys, values, mask[:, None]).transpose(1, 2).reshape(B * N, H * D)
torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
assert torch.equal(cache[:, :N, 0].float(), k) and torch.equal(cache[:, :N, 1].float(), v)
"""
HEAD = """
first = tokens.clone()
lm_head_choose(x, norm_weight, norm_bias, 1e-5, head, seeds, streams, positions, temperature=0.8, top_k=50,
               out=tokens, scratch=scratch)
assert torch.equal(first, tokens)
logits = torch.nn.functional.layer_norm(x.float(), (width,)) @ head.float().T
kept = logits.topk(51).indices  # one more, for a tie in rounding
assert all(token in row for token, row in zip(tokens.tolist(), kept.tolist()))
lm_head_choose(x, norm_weight, norm_bias, 1e-5, head, seeds, streams, positions, greedy=True, out=tokens,
               scratch=scratch)
assert tokens.tolist() == logits.argmax(1).tolist()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("index", "check"), [(0, ATTENTION), (1, HEAD)], ids=["attention", "head"])
def test_kernels_alone(index, check):
    """Against torch's own operations."""
    found = snippets("kernels/README.md")
    assert len(found) == 2
    run(found[index] + check, TRITON_INTERPRET="1")


PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "stagedspec/README.md", "kernels/README.md", "bench/README.md")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        target, anchor = link
        if target.startswith("http"):
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (found).read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in known, link
