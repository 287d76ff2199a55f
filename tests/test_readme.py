"""The README's code runs."""

import re
from pathlib import Path

import jax

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_runs():
    scopes = [{} for _ in re.findall(r"```python\n", README)]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block, scope in zip(blocks, scopes, strict=True):
        exec(block, scope)
    five_lines, loop, fused, mesh = scopes
    assert jax.numpy.all(five_lines["params"]["dense"]["kernel"] < 1), "a step down"
    start = {"layers": {"kernel": jax.numpy.zeros((4, 32, 32))}}
    assert fused["value"] < fused["loss"](start, jax.random.normal(jax.random.key(19), (8, 32)))
    assert float(loop["loss"]) < 1.0, "twenty steps towards the identity on unit noise"
    updates, state = mesh["update"](mesh["params"], mesh["state"], mesh["params"])
    assert updates["dense"]["kernel"].sharding.spec == mesh["P"]("fsdp")
    assert state[0].basis["dense"]["kernel"].shape == (512, 128)
