"""The memory planner against real arrays, real models and the programs of examples/."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from common import llama, mesh, optimizers
from common.text import Tokenizer
from flax import nnx

import sumo_optax
from sumo_optax import __main__ as program
from sumo_optax import _decoder, _plan, abstract_state

SMALL = _decoder.Model(
    vocab=64, width=32, hidden=48, layers=2, heads=2, query_width=32, key_width=32
)
SHAPE = llama.LlamaConfig(vocab=64, width=32, hidden=48, heads=2, layers=2, scan_layers=True)
MESHES = ["fsdp=8", "data=2,fsdp=2,tensor=2"]


def rows_of(mesh_text=None, dtype="float32"):
    sizes = {} if mesh_text is None else _plan.parse_mesh(mesh_text)
    planned = _plan.plan("small", SMALL, rank=4, mesh=sizes, dtype=dtype)
    return {row.optimizer: row for row in planned.rows}


def real_parameters():
    return nnx.to_pure_dict(nnx.state(llama.Llama(SHAPE, nnx.Rngs(0)), nnx.Param))


def shapes(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in leaves}


def test_presets_are_those_of_pretrain():
    assert list(_plan.PRESETS) == list(llama.PRESETS)
    for name, model in _plan.PRESETS.items():
        theirs = llama.PRESETS[name]
        assert model[1:5] == (theirs.width, theirs.hidden, theirs.layers, theirs.heads)
        assert model.query_width == model.key_width == theirs.width
    assert _plan.PRESETS["tiny"].vocab == Tokenizer().vocab


def test_parameters_are_those_of_the_model_of_pretrain():
    create = lambda: llama.Llama(SHAPE, nnx.Rngs(0))
    theirs = nnx.to_pure_dict(nnx.state(nnx.eval_shape(create), nnx.Param))
    assert shapes(_decoder.parameters(SMALL, jnp.float32)) == shapes(theirs)


@pytest.mark.parametrize("text", MESHES)
def test_shardings_are_those_of_pretrain(text):
    devices, params = mesh.parse(text), _decoder.parameters(SMALL, jnp.float32)
    spec = lambda tree: jax.tree.map(lambda x: x.spec, tree)
    theirs = spec(mesh.parameter_shardings(devices, params))
    assert spec(_plan.shardings(devices.abstract_mesh, params)) == theirs


def test_bytes_of_adamw_by_hand():
    row = rows_of(dtype="bfloat16")["AdamW"]
    count = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert row.parameters == row.gradients == 2 * count
    assert row.state == 2 * 2 * count + 4
    assert row.total == 8 * count + 4


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_plan.optimizers(4)))
def test_bytes_are_those_of_real_arrays(name):
    params, tx = real_parameters(), _plan.optimizers(4)[name]
    held = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    row = rows_of()[name]
    assert (row.parameters, row.state) == (held(params), held(tx.init(params)))


@pytest.mark.slow
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("name", list(_plan.optimizers(4)))
def test_bytes_are_those_of_real_arrays_on_a_mesh(name, text):
    devices, params, tx = mesh.parse(text), real_parameters(), _plan.optimizers(4)[name]
    placed = mesh.parameter_shardings(devices, params)
    params = jax.device_put(params, placed)
    state_sharding = jax.tree.map(lambda x: x.sharding, abstract_state(tx, params, placed))
    state = jax.jit(tx.init, out_shardings=state_sharding)(params)
    first = jax.devices()[0]
    held = lambda tree: sum(
        s.data.nbytes
        for x in jax.tree.leaves(tree)
        for s in x.addressable_shards
        if s.device == first
    )
    row = rows_of(text)[name]
    assert (row.parameters, row.state) == (held(params), held(state))
    assert row.parameters < sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_plan.PROJECTED))
def test_projected_gradients_are_those_of_real_arrays(name):
    """Of shapes alone, but of the function that makes them."""
    params = jax.eval_shape(real_parameters)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    state = jax.eval_shape(_plan.optimizers(4)[name].init, params)
    grads = jax.eval_shape(sumo_optax.subspace_value_and_grad(loss), params, state)[1]
    assert rows_of()[name].projected == sum(4 * x.size for x in jax.tree.leaves(grads))


# Peak bytes of a step with `value_and_update` on one H100 by preset, tokens, optimizer, as compiled
# with jax 0.10.2: benchmarks/compile_one.py train_7b_h100 "sumo, value_and_update" and the like,
# those of other lengths with Model.length changed.
COMPILED = {
    ("7b", 2048, "SUMO"): 22_102_766_020,
    ("7b", 1024, "SUMO"): 21_263_692_996,
    ("7b", 256, "SUMO"): 20_992_245_444,
    ("7b", 2048, "AdamW"): 42_973_601_844,
    ("7b", 256, "AdamW"): 41_039_913_012,
    ("7b", 2048, "Muon"): 32_889_189_620,
    ("1b", 4096, "SUMO"): 11_546_918_276,
    ("1b", 2048, "SUMO"): 7_097_883_524,
    ("1b", 512, "SUMO"): 5_644_185_220,
    ("1b", 4096, "AdamW"): 14_071_722_804,
    ("1b", 2048, "AdamW"): 9_919_070_772,
    ("1b", 512, "AdamW"): 8_351_167_540,
    ("1b", 2048, "Muon"): 8_216_219_124,
    ("1b", 512, "Muon"): 6_686_720_756,
    ("1b", 2048, "MoFaSGD"): 7_321_931_732,
    ("1b", 2048, "Online Subspace Descent"): 9_715_090_900,
}


@pytest.mark.parametrize(("name", "tokens"), sorted({key[:2] for key in COMPILED}))
def test_peaks_are_within_a_tenth_of_the_compilers(name, tokens):
    rank, state_dtype = {"7b": (1024, "bfloat16"), "1b": (512, "float32")}[name]
    planned = _plan.plan(
        name,
        _plan.PRESETS[name],
        rank=rank,
        mesh={},
        dtype="bfloat16",
        state_dtype=state_dtype,
        tokens=tokens,
    )
    fused = {row.optimizer: row.fused for row in planned.rows}
    compiled = {key[2]: peak for key, peak in COMPILED.items() if key[:2] == (name, tokens)}
    for optimizer, peak in compiled.items():
        assert fused[optimizer] == pytest.approx(peak, rel=0.1), optimizer


def test_a_peak_grows_with_the_square_of_the_tokens():
    params = _decoder.parameters(SMALL, jnp.bfloat16)
    peak = lambda tokens: _plan.bytes_of_a_fused_step(SMALL, params, tokens, update=0)
    assert peak(2048) - peak(1024) > 3 * (peak(1024) - peak(512)) > 0


def test_logits_can_be_the_peak():
    params = _decoder.parameters(SMALL, jnp.bfloat16)
    peak = lambda vocab: _plan.bytes_of_a_fused_step(
        SMALL._replace(vocab=vocab), params, tokens=8, update=0
    )
    assert peak(200_000) - peak(100_000) == 100_000 * (8 * (4 + 2) + 32 * 2)


def test_whole_polar_steps_by_hand():
    """Of square and of wide matrices, stated in tokens; none where a token sees few experts."""
    square, wide = 2 * 4, 2 * 3  # 32 x 32 and 32 x 48
    newton_schulz = square * 5 * 6 * 32**3 + wide * 5 * (4 * 32**2 * 48 + 2 * 32**3)
    exact = square * 7 * 22 * 32**3 + wide * 7 * (4 * 32**2 * 48 + 18 * 32**3)
    of_a_token = 6 * (64 * 32 + square * 32 * 32 + wide * 32 * 48)
    expected = {
        "newton_schulz": math.ceil(newton_schulz / of_a_token),
        "exact": math.ceil(exact / of_a_token),
    }
    planned = _plan.plan("small", SMALL, rank=4, mesh={}, dtype="float32")
    assert planned.polar_tokens == expected == json.loads(planned.as_json())["polar_tokens"]
    words = " ".join(str(planned).split())
    assert f"{expected['newton_schulz']} / T with five Newton-Schulz steps" in words
    assert f"at most {expected['exact']} / T with the exact polar factor" in words
    experts = _plan.plan("experts", SMALL._replace(experts=4), rank=4, mesh={}, dtype="float32")
    assert experts.polar_tokens is None and "whole polar step" not in str(experts)


@pytest.mark.slow
def test_galore_holds_what_optax_holds():
    options = {"learning_rate": 1.0, "adam_learning_rate": 1.0, "rank": 4, "weight_decay": 0.0}
    unrolled = nnx.state(
        nnx.eval_shape(
            lambda: llama.Llama(llama.dataclasses.replace(SHAPE, scan_layers=False), nnx.Rngs(0))
        ),
        nnx.Param,
    )
    theirs = jax.eval_shape(optimizers.galore(**options).init, nnx.to_pure_dict(unrolled))
    ours = jax.eval_shape(
        _plan.optimizers(4)["GaLore"].init, _decoder.parameters(SMALL, jnp.float32)
    )
    floats = lambda tree: sum(
        math.prod(x.shape) for x in jax.tree.leaves(tree) if x.dtype == jnp.float32
    )
    assert floats(theirs) == floats(ours)


CONFIGS = Path(__file__).parent / "configs"

# Parameters of released models, as the models' own weights have them, by the names of files in
# `configs`, which hold their sizes. Gemma 3 of 4B is counted without what reads pictures.
RELEASED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "gpt2": 124_439_808,
    "pythia-160m": 162_322_944,
    "opt-125m": 125_239_296,
}


def test_parameters_of_released_models():
    assert set(RELEASED) == {path.stem for path in CONFIGS.glob("*.json")}
    for name, count in RELEASED.items():
        model, remark = _decoder.read_config(CONFIGS / f"{name}.json")
        params = _decoder.parameters(model, jnp.bfloat16)
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count, name
        assert remark == ("Only the language model is counted." if name == "gemma-3-4b" else "")


def test_experts_are_matrices_of_their_own():
    model, _ = _decoder.read_config(CONFIGS / "qwen1.5-moe-a2.7b.json")
    report = sumo_optax.describe(512, _decoder.parameters(model, jnp.bfloat16))
    leaves = {leaf.path: leaf for leaf in report.leaves}
    up = leaves["layers/experts/up_proj/kernel"]
    assert (up.batch, up.m, up.n) == ((24, 60), 2048, 1408)
    assert leaves["layers/shared_expert/up_proj/kernel"].batch == (24,)


def test_an_unknown_decoder_is_read_as_a_llama_and_said_so(tmp_path, capsys):
    config = json.loads((CONFIGS / "tinyllama-1.1b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"model_type": "new"}))
    assert program.main(["plan", "--config", str(path), "--rank", "16"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1,100,048,384 parameters" in printed
    assert "The model_type 'new' is not known. The model is read as a LLaMA." in printed


def test_biases_that_a_file_says_are_counted():
    config = json.loads((CONFIGS / "tinyllama-1.1b.json").read_text())
    count = lambda flags: sum(
        math.prod(x.shape)
        for x in jax.tree.leaves(
            _decoder.parameters(_decoder._of_config(config | flags)[0], jnp.float32)
        )
    )
    attention = count({"attention_bias": True}) - count({})
    assert attention == 22 * (2048 + 256 + 256 + 2048)
    assert count({"mlp_bias": True}) - count({}) == 22 * (5632 + 5632 + 2048)


@pytest.mark.parametrize(
    ("mesh", "notes"),
    [
        ("fsdp=8", []),
        ("data=2,fsdp=4", ["data: every device along this axis holds the same"]),
        ("fsdp=7", ["fsdp=7 divides nothing: no matrix has a size that is a multiple of 7"]),
        ("tensor=3", ["tensor=3 does not divide embed_tokens, layers/mlp"]),
    ],
)
def test_says_what_a_mesh_does_not_divide(mesh, notes):
    model = SMALL._replace(hidden=40, vocab=64, query_width=48, key_width=48, heads=3)
    sizes = _plan.parse_mesh(mesh)
    planned = _plan.plan("small", model, rank=4, mesh=sizes, dtype="float32")
    assert len(planned.notes) == len(notes)
    for found, expected in zip(planned.notes, notes, strict=True):
        assert found.startswith(expected)
        assert found[:20] in str(planned)


def test_table_and_json_say_the_same(capsys):
    arguments = ["plan", "--preset", "tiny", "--rank", "16", "--mesh", "fsdp=8"]
    assert program.main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert program.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: 857,216 parameters in bfloat16"
    assert lines[1].startswith("Each of 8 devices (fsdp=8) holds ") and "At rank 16:" in lines[2]
    assert data["parameters"] == 857_216 and data["mesh"] == {"fsdp": 8}
    for row in data["rows"]:
        (line,) = (x for x in lines if x.startswith(row["optimizer"] + " "))
        assert f" {row['state'] / data['rows'][0]['state']:.2f} " in line
        assert row["total"] == row["parameters"] + row["gradients"] + row["state"]
        assert row["fused"] is None, "it is for one device"
    assert max(map(len, lines)) <= 80


def test_the_default_rank_is_a_quarter_of_the_short_side(capsys):
    def planned(*arguments):
        assert program.main(["plan", "--preset", "tiny", "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    assert planned() == planned("--rank", "32") == planned("--rank", "0.25")
    assert planned() != planned("--rank", "0.5") == planned("--rank", "64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "one of the arguments --preset --config is required"),
        (["plan", "--preset", "8b"], "invalid choice: '8b'"),
        (["plan", "--prest", "7b"], "unknown option --prest; did you mean --preset?"),
        (["plan", "--preset", "7b", "--quick"], "unknown option --quick; --help has all options"),
        (["plna"], "invalid choice: 'plna'"),
        (["plan", "--preset", "7b", "--rank", "0"], "rank must be an integer of at least 1"),
        (["plan", "--preset", "7b", "--tokens", "0"], "tokens must be an integer of at least 1"),
        (["plan", "--preset", "7b", "--state-dtype", "int3"], "invalid choice: 'int3'"),
        (["plan", "--preset", "7b", "--mesh", "fsdp=0"], "got 'fsdp=0'"),
        (["plan", "--preset", "7b", "--mesh", "fsdp=2,fsdp=4"], "got 'fsdp=2,fsdp=4'"),
        (["plan", "--preset", "7b", "--rank", "half"], "a fraction such as 0.25, got 'half'"),
        (["plan", "--config", "{tmp}/none.json"], "{tmp}/none.json: No such file or directory"),
        (["plan", "--config", "{tmp}"], "{tmp}/config.json: No such file or directory"),
        (["plan", "--config", "{tmp}/broken.json"], "broken.json is not JSON"),
        (["plan", "--config", "{tmp}/list.json"], "list.json holds no JSON object"),
        (["plan", "--config", "{tmp}/bert.json"], "model_type is 'bert'"),
        (["plan", "--config", "{tmp}/short.json"], "hidden_size must be an integer of at least 1"),
        (["plan", "--config", "{tmp}/experts.json"], "must be one of mixtral, qwen2_moe, qwen3"),
        (["plan", "--config", "{tmp}/latent.json"], "kv_lora_rank is 512, but only models"),
        (["plan", "--config", "{tmp}/small_opt.json"], "word_embed_proj_dim must be hidden_size"),
    ],
)
def test_refuses_with_one_line(arguments, message, tmp_path, capsys):
    llama, opt = (json.loads((CONFIGS / f"{x}.json").read_text()) for x in ("gemma-2b", "opt-125m"))
    files = {
        "broken": "{",
        "list": "[]",
        "bert": '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
        "short": '{"model_type": "llama"}',
        "experts": json.dumps(llama | {"num_experts": 8}),
        "latent": json.dumps(llama | {"kv_lora_rank": 512}),
        "small_opt": json.dumps(opt | {"word_embed_proj_dim": 512}),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content)
    assert program.main([x.replace("{tmp}", str(tmp_path)) for x in arguments]) == 2
    out, err = capsys.readouterr()
    message = message.replace("{tmp}", str(tmp_path))
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_reads_a_folder_as_its_config(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text((CONFIGS / "gpt2.json").read_text())
    rows = []
    for path in (tmp_path, config):
        assert program.main(["plan", "--json", "--config", str(path)]) == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-u", "-m", "sumo_optax", "plan", "--preset", "7b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_alone_it_prints_help_and_says_its_version(capsys):
    assert program.main([]) == 0
    assert "plan" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        program.main(["--version"])
    assert capsys.readouterr().out == f"sumo_optax {sumo_optax.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        program.main(["plan", "--help"])
    printed = capsys.readouterr().out
    for words in ("model, one of the two:", "training:", "(default: bfloat16)", "(default: 2048)"):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.slow
def test_runs_as_a_module():
    command = [sys.executable, "-m", "sumo_optax", "plan", "--preset", "7b", "--mesh", "fsdp=8"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "6,738,415,616 parameters" in result.stdout
