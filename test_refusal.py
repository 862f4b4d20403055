"""Proofs for refusal.py: known answers, identities of the paper, independent oracles.

pytest                                          # two minutes, nothing to download
pytest -m census                                # every architecture that transformers has
pytest -m seeds                                 # the tiny model's bars on five seeds
REFUSAL_MODEL=folder pytest -m real             # the paper's claims on a real model

python test_refusal.py blank student.py         # the classroom's copy of refusal.py
REFUSAL=student.py pytest -k exercise_3         # grade an exercise; without -k: all of them

python test_refusal.py census                   # the census as a table
python test_refusal.py bench [--model FOLDER]   # the search against the plain procedure
"""

import ast
import collections
import doctest
import fractions
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

try:
    import resource
except ImportError:  # Windows has none: a few proofs fail there, and the exercises are graded all the same
    resource = None

HERE = Path(__file__).resolve().parent


def load(path):
    """A file as a module of its own."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if not Path(os.environ.get("REFUSAL", __file__)).is_file():
    pytest.exit(f"REFUSAL={os.environ['REFUSAL']} is no file: name the one to grade, seen from {os.getcwd()}", returncode=2)
R = load(os.environ.get("REFUSAL", HERE / "refusal.py"))  # a student's file is graded like ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # there is no configuration file in which these marks could be registered
    census_mark, real, seeds = pytest.mark.census, pytest.mark.real, pytest.mark.seeds


@pytest.fixture(scope="session")
def tiny():
    """The tiny chat model, trained once: (model, tokenizer)."""
    return R.train_tiny_model(seed=0)


@pytest.fixture(scope="session")
def data():
    """The project's prompts, split as the program splits them."""
    return {kind: SimpleNamespace(**dict(zip(("train", "val", "test"), R.split(R.load_prompts(R.PROMPTS / f"{kind}.txt"), 128, 32, 100))))
            for kind in ("harmful", "harmless")}  # fmt: skip


@pytest.fixture(scope="session")
def found(tiny, data):
    """The direction of the tiny model, by the program's own steps."""
    means = [R.mean_activations(*tiny, data[kind].train) for kind in ("harmful", "harmless")]
    chosen = R.select_direction(*tiny, R.refusal_directions(*means), data["harmful"].val, data["harmless"].val)
    args = SimpleNamespace(max_new_tokens=24, batch_size=32, coefficient=None)
    chosen.coefficient = R.find_dose(*tiny, chosen, data["harmless"].val, args)
    return chosen


def small_model(scale=1.0, **sizes):
    """A random Llama and a tokenizer to go with it: (model, tokenizer)."""
    tokenizer = R.tiny_tokenizer(["How do I boil an egg?", "Write a poem about rain and bad weather", "Explain how to swim"])
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4) | sizes
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(scale if p.ndim > 1 else 1.0)
    return model, tokenizer


@pytest.fixture
def toy():
    """A small random model and its tokenizer, new for every test: (model, tokenizer)."""
    return small_model(scale=8.0)  # the default initialisation is so small that every block does next to nothing


PROMPTS = ["How do I boil an egg?", "Write a poem", "Explain how to swim in bad weather, in rain, and in the dark of the night"]


def stream(model, batch):
    """The residual stream by transformers' own means: block inputs, and what the last block gives, read before the final norm."""
    last = []
    with torch.no_grad(), R.hooked([model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))]):
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]
    return [*states, *last]  # (n_layers + 1) * (batch, seq, d_model)


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model(**R.forward_arguments(model, R.tokenize(tokenizer, PROMPTS))).logits


# Prompts ---------------------------------------------------------------------------------------------


def words(prompt):
    return set(re.findall(r"[a-z'-]+", prompt.lower()))


def test_prompts_match_in_form():
    harmful, harmless = (R.load_prompts(R.PROMPTS / f"{kind}.txt") for kind in ("harmful", "harmless"))
    assert len(harmful) == len(harmless) >= 260
    for bad, good in zip(harmful, harmless):
        assert bad.split()[0] == good.split()[0] and (bad[-1] == "?") == (good[-1] == "?"), (bad, good)
        assert abs(len(bad.split()) - len(good.split())) <= 2, (bad, good)
    lengths = [[len(p.split()) for p in prompts] for prompts in (harmful, harmless)]
    for q in (0.1, 0.5, 0.9):
        low, high = (sorted(x)[int(q * len(x))] for x in lengths)
        assert abs(low - high) <= 1
    for category in range(10):  # harmful.txt has ten categories of 28 lines
        counts = collections.Counter(p.split()[0] for p in harmful[28 * category : 28 * category + 28])
        assert len(counts) >= 8 and max(counts.values()) <= 8


def test_prompts_have_no_near_duplicates():
    for kind in ("harmful", "harmless"):
        bags = [words(p) for p in R.load_prompts(R.PROMPTS / f"{kind}.txt")]
        assert len(bags) == len((R.PROMPTS / f"{kind}.txt").read_text().splitlines()), "no repetitions, no blank lines"
        assert max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]) < 0.6


def test_splits_are_disjoint_repeatable_and_spread_over_the_categories(data):
    prompts = R.load_prompts(R.PROMPTS / "harmful.txt")
    parts = data["harmful"].train, data["harmful"].val, data["harmful"].test
    assert [len(part) for part in parts] == [128, 32, 100] and len(set().union(*parts)) == 260
    for part in parts:
        counts = collections.Counter(prompts.index(p) // 28 for p in part)
        assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 2
    train, val, test = R.split(prompts, 64, 16, 50)
    assert set(train) < set(parts[0]) and set(test) < set(parts[2]) and not set(val) & set(parts[0])
    with pytest.raises(R.BadUse, match="261 prompts"):
        R.split(prompts[:260], 128, 32, 101)


@pytest.mark.parametrize("content, message", [(b"", "no instruction"), (b"\n \n", "no instruction"), (b"\xff\xfe\x00x", "UTF-8")])
def test_bad_prompt_files_are_one_sentence(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(R.BadUse, match=message):
        R.load_prompts(tmp_path / "p.txt")


def test_prompt_files_from_other_systems(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffOne two\r\n\r\nThree \u00e9\r\nOne two\r\n".encode())
    assert R.load_prompts(tmp_path / "p.txt") == ["One two", "Three \u00e9"]
    with pytest.raises(R.BadUse, match="No such file"):
        R.load_prompts(tmp_path / "missing.txt")


# Tokens and positions ----------------------------------------------------------------------------------

TEMPLATES = {  # in the manner of ChatML, Llama-2 and Gemma; with the tail that each leaves after the instruction
    "chatml": ("{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
               ["<|end|>", "\u010a", "<|assistant|>", "\u010a"]),
    "brackets": ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}",
                 ["<|assistant|>"]),
    "system": ("<|user|>Be brief.<|end|>{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|end|><|assistant|>{% endif %}",
               ["\u010a", "<|end|>", "<|assistant|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_positions_are_the_tail_of_the_template(toy, name):
    template, tail = TEMPLATES[name]
    _, tokenizer = toy
    tokenizer.chat_template = template
    assert tokenizer.convert_ids_to_tokens(R.template_tail(tokenizer)) == tail


def test_tokenize_pads_on_the_left_and_adds_one_bos(toy):
    _, tokenizer = toy
    tokenizer.padding_side = "right"  # whatever the tokenizer was set to
    tokenizer.chat_template = "<|end|>" + TEMPLATES["chatml"][0]  # <|end|> plays the BOS here
    tokenizer.bos_token = "<|end|>"
    batch = R.tokenize(tokenizer, PROMPTS)
    assert (batch["attention_mask"].diff(dim=1) >= 0).all() and batch["attention_mask"][:, -1].all()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        start = tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist())[:2]
        assert start == ["<|end|>", "<|user|>"]


def test_the_refusal_token_is_tokenized_where_it_stands(toy):
    _, tokenizer = toy
    tokenizer.chat_template = TEMPLATES["brackets"][0]  # the reply follows a space: " I", not "I"
    assert tokenizer.convert_ids_to_tokens(R.refusal_tokens(tokenizer))[0].startswith("\u0120")
    tokenizer.chat_template = TEMPLATES["chatml"][0]
    assert "I" in tokenizer.convert_ids_to_tokens(R.refusal_tokens(tokenizer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # rotary and learned positions
def test_padding_changes_nothing(toy, family):
    model, tokenizer = toy
    if family == "gpt2":
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.2
        )
        model = transformers.GPT2LMHeadModel(config).eval()
    together = R.refusal_scores(model, tokenizer, PROMPTS)
    tokens, ids = R.refusal_tokens(tokenizer), [R.tokenize(tokenizer, [p])["input_ids"] for p in PROMPTS]
    with torch.no_grad():  # alone, and without a word about positions
        alone = torch.cat([R.log_odds(model(input_ids=x).logits[:, -1], tokens) for x in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    means = R.mean_activations(model, tokenizer, PROMPTS)
    alone = sum(R.mean_activations(model, tokenizer, [p]) for p in PROMPTS) / len(PROMPTS)
    torch.testing.assert_close(means, alone, atol=1e-5, rtol=1e-5)


def test_packing_changes_nothing(toy, monkeypatch):
    model, tokenizer = toy
    tokenizer.chat_template = "<|user|>You answer in few words, and you say what you know.<|end|>" + TEMPLATES["chatml"][0]
    prompts = [*PROMPTS, "Write a poem about rain", "Write a poem"]  # the last is how another one begins
    directions = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
    batch = R.forward_arguments(model, R.tokenize(tokenizer, prompts))
    packed, last = R.arrange(model, batch, keep=4)
    opening = len(os.path.commonprefix([ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]))
    assert opening > 20 and packed["input_ids"].shape == (1, batch["attention_mask"].sum() - 4 * opening) and len(last) == 5
    measure = lambda: (
        R.next_token_logits(model, tokenizer, prompts),
        R.mean_activations(model, tokenizer, prompts),
        R.attribution(model, tokenizer, directions, prompts)[1],
    )
    r, ours = torch.randn(32, generator=torch.Generator().manual_seed(1)), []
    for way in (nullcontext(), R.ablate(model, r), R.add(model, r, 2)):
        with way:
            ours.append(measure())
    monkeypatch.setattr(R, "arrange", R.padded)
    for way, once in zip((nullcontext(), R.ablate(model, r), R.add(model, r, 2)), ours):
        with way:
            torch.testing.assert_close(once, measure(), atol=1e-4, rtol=1e-4)


def test_results_keep_the_order_of_the_prompts_and_survive_out_of_memory(toy):
    model, tokenizer = toy
    sizes = []

    def step(batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch["attention_mask"].sum(1).tolist()

    assert R.run_batches(step, model, tokenizer, PROMPTS, 3) == [len(R.tokenize(tokenizer, [p])["input_ids"][0]) for p in PROMPTS]
    assert sizes == [3, 2, 1, 1, 1]


# Means and directions ----------------------------------------------------------------------------------


def test_mean_activations_are_the_block_inputs(toy):
    model, tokenizer = toy
    n = len(R.template_tail(tokenizer))
    expected = 0
    for prompt in PROMPTS:  # one by one, no padding, hidden states as transformers gives them
        batch = R.forward_arguments(model, R.tokenize(tokenizer, [prompt]))
        states = model(**batch, output_hidden_states=True).hidden_states[:-1]  # n_layers * (1, seq, d_model)
        expected = expected + torch.stack([state[0, -n:].double() for state in states], dim=1) / len(PROMPTS)
    means = R.mean_activations(model, tokenizer, PROMPTS, batch_size=2)
    assert means.dtype == torch.float64
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)


def test_a_planted_direction_is_found(toy):
    model, tokenizer = toy
    planted = torch.randn(32, generator=torch.Generator().manual_seed(1))
    bad = tokenizer(" bad", add_special_tokens=False)["input_ids"][-1]
    marked = []
    handles = [
        model.model.embed_tokens.register_forward_hook(lambda m, args, out: marked.append((args[0] == bad).any(1))),
        model.model.layers[2].register_forward_pre_hook(
            lambda m, args: (args[0] + 40 * marked[-1][:, None, None] * planted, *args[1:])
        ),
    ]
    nouns = ["rain", "egg", "poem", "swim", "boil", "weather"]
    with R.hooked(handles):
        harmful, harmless = (R.mean_activations(model, tokenizer, [f"How do I {kind}{a} {b}?" for a in nouns for b in nouns])
                             for kind in ("bad ", ""))  # fmt: skip
    r = R.refusal_directions(harmful, harmless)[-1, 2]
    assert torch.cosine_similarity(r, planted.double(), dim=0) > 0.99


def test_auroc_counts_pairs():
    a, b = torch.randn(30), torch.randn(40) - 1
    b[:5] = a[:5]
    naive = sum((x > y).item() + 0.5 * (x == y).item() for x in a for y in b) / (30 * 40)
    assert R.auroc(a, b) == pytest.approx(naive)


# Ablation and addition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float32, (3, 7, 64)), (torch.bfloat16, (2, 5, 300)), (torch.float16, (1, 1, 33)), (torch.float32, (129,))],
)
def test_projecting_out_leaves_nothing_and_everything_else(dtype, shape):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x, r = torch.randn(shape, generator=g).to(dtype), R.unit(torch.randn(shape[-1], generator=g) * 10.0 ** (seed - 10))
        kept, before = R.project_out(x, r), x.clone()
        tolerance = 8 * torch.finfo(dtype).eps
        assert kept.dtype == dtype and kept.shape == x.shape and torch.equal(x, before)
        assert (kept.float() @ r).abs().max() <= tolerance * x.float().norm(dim=-1).max()
        torch.testing.assert_close(kept.float() + (x.float() @ r)[..., None] * r, x.float(), atol=tolerance * 4, rtol=tolerance)
        torch.testing.assert_close(R.project_out(kept, r), kept, atol=tolerance * 4, rtol=tolerance)  # twice is once


def test_ablation_clears_the_stream_everywhere(toy):
    model, tokenizer = toy
    r = torch.randn(32)
    batch = R.forward_arguments(model, R.tokenize(tokenizer, PROMPTS))
    with R.ablate(model, 17.0 * r):  # of any length
        for x in stream(model, batch):
            assert (x @ R.unit(r)).abs().max() < 1e-4 * x.norm(dim=-1).max()


def test_ablation_is_the_papers(toy):
    """Project at every block's input, and at what attention and MLP give: the authors' hooks, the same logits."""
    model, tokenizer = toy
    r = R.unit(torch.randn(32))
    out = lambda x: x - (x @ r)[..., None] * r
    with R.ablate(model, r):
        ours = logits_of(model, tokenizer)
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_pre_hook(lambda m, args: (out(args[0]), *args[1:])))
        handles.append(block.self_attn.register_forward_hook(lambda m, args, output: (out(output[0]), *output[1:])))
        handles.append(block.mlp.register_forward_hook(lambda m, args, output: out(output)))
    with R.hooked(handles):
        theirs = logits_of(model, tokenizer)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - logits_of(model, tokenizer)).abs().max() > 0.01


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_addition_moves_one_block_input_by_exactly_the_vector(toy, layer):
    model, tokenizer = toy
    batch, v = R.forward_arguments(model, R.tokenize(tokenizer, PROMPTS)), torch.randn(32)
    seen = {}
    with R.reading(model, lambda l, x: seen.setdefault(l, []).append(x)):
        model(**batch)
    with R.add(model, v, layer, 1.5), R.reading(model, lambda l, x: seen[l].append(x)):
        model(**batch)
    for l, (before, after) in seen.items():
        if l < layer:
            assert torch.equal(before, after)
        elif l == layer:
            assert torch.equal(after, before + 1.5 * v)
        else:
            assert not torch.allclose(after, before)


def test_reading_only_reads(toy):
    model, tokenizer = toy
    before, seen = logits_of(model, tokenizer), {}
    with R.reading(model, lambda layer, x: seen.setdefault(layer, 2 * x)):  # what it returns is no stream
        assert torch.equal(logits_of(model, tokenizer), before) and list(seen) == [0, 1, 2, 3, 4]


def test_hooks_leave_no_trace(toy):
    model, tokenizer = toy
    before, v = logits_of(model, tokenizer), torch.randn(32)
    with R.ablate(model, v), R.add(model, v, 1):
        assert not torch.equal(logits_of(model, tokenizer), before)
    for context in (R.ablate(model, v), R.add(model, v, 1)):
        with pytest.raises(ZeroDivisionError), context:
            1 / 0
    assert torch.equal(logits_of(model, tokenizer), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_vectors_that_make_no_sense_are_refused(toy):
    model, _ = toy
    for bad, message in (
        (torch.zeros(32), "no direction"),
        (torch.full((32,), math.nan), "no direction"),
        (torch.ones(31), "needs"),
    ):
        with pytest.raises(R.BadUse, match=message), R.ablate(model, bad):
            pass
    with pytest.raises(R.BadUse, match="no layer 4"), R.add(model, torch.ones(32), 4):
        pass
    with pytest.raises(R.BadUse, match="coefficient"), R.add(model, torch.ones(32), 1, math.inf):
        pass


# Scores ------------------------------------------------------------------------------------------------


def test_score_and_kl_against_naive_oracles():
    p, q = 4 * torch.randn(5, 50, dtype=torch.float64), 4 * torch.randn(5, 50, dtype=torch.float64)
    P, Q = p.exp() / p.exp().sum(-1, keepdim=True), q.exp() / q.exp().sum(-1, keepdim=True)
    share = P[:, [3, 7]].sum(-1)
    torch.testing.assert_close(R.log_odds(p, [3, 7]), (share / (1 - share)).log())
    torch.testing.assert_close(R.kl_divergence(p, q).double(), (P * (P / Q).log()).sum(-1), atol=1e-5, rtol=1e-5)
    assert R.kl_divergence(p, p).abs().max() == 0
    sure = torch.tensor([[200.0, 0.0, 0.0]])  # where a naive formula gives log 0
    assert R.log_odds(sure, [0]).item() == pytest.approx(200 - math.log(2)) and R.log_odds(sure, [1]).item() == pytest.approx(
        -200, abs=1e-3
    )


def test_scores_read_the_last_position(toy):
    model, tokenizer = toy
    tokens = R.refusal_tokens(tokenizer)
    for prompt, score in zip(PROMPTS, R.refusal_scores(model, tokenizer, PROMPTS)):
        p = model(**R.forward_arguments(model, R.tokenize(tokenizer, [prompt]))).logits[0, -1].double().softmax(-1)[tokens].sum()
        assert score.item() == pytest.approx((p / (1 - p)).log().item(), abs=1e-4)


def test_statistics_against_known_values():
    assert R.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=2e-4)  # the example of Newcombe (1998)
    assert R.wilson(0, 10)[0] == 0 and R.wilson(10, 10)[1] == 1
    before, after = [True] * 10 + [False] * 10, [True] * 8 + [False] * 2 + [True] * 8 + [False] * 2
    assert R.mcnemar(before, after) == pytest.approx(0.109375)  # 2 lost, 8 won
    assert R.mcnemar(before, before) == 1


def test_reply_loss_is_the_mean_cross_entropy(toy):
    model, tokenizer = toy
    replies = ["I swim", "", "rain in the dark and more rain"]
    total, count = 0.0, 0
    for prompt, reply in zip(PROMPTS, replies):
        chat = R.tokenize(tokenizer, [prompt])["input_ids"][0].tolist()
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        logp = model(input_ids=torch.tensor([chat + ids])).logits[0].log_softmax(-1)
        total -= sum(logp[len(chat) + i - 1, token].item() for i, token in enumerate(ids))
        count += len(ids)
    assert R.reply_loss(model, tokenizer, PROMPTS, replies, batch_size=2) == pytest.approx(total / count, abs=1e-4)


def test_generation_is_greedy_whatever_the_checkpoint_says(toy):
    model, tokenizer = toy
    plain = R.generate(model, tokenizer, PROMPTS, 6)
    ids = R.tokenize(tokenizer, [PROMPTS[0]])["input_ids"]
    for _ in range(6):  # greedy by hand, no cache
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert plain[0] == tokenizer.decode(
        ids[0, R.tokenize(tokenizer, [PROMPTS[0]])["input_ids"].shape[1] :], skip_special_tokens=True
    )
    model.generation_config = own = transformers.GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, suppress_tokens=[5, 6, 7, 8]
    )
    assert R.generate(model, tokenizer, PROMPTS, 6) == plain
    assert model.generation_config is own


# The weights -------------------------------------------------------------------------------------------


def test_orthogonalized_weights_are_the_ablated_model(toy):
    model, tokenizer = toy
    r = torch.randn(32)
    with R.ablate(model, r):
        hooked = logits_of(model, tokenizer)
    names = R.orthogonalize(model, r)
    torch.testing.assert_close(logits_of(model, tokenizer), hooked, atol=1e-4, rtol=1e-4)
    parts = [f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(names) == sorted(["model.embed_tokens.weight", *parts])
    W = model.model.layers[1].mlp.down_proj.weight  # (d_model, d_mlp): nn.Linear stores (out, in)
    assert (R.unit(r) @ W).abs().max() < 1e-5


def test_quantised_weights_are_refused_in_one_sentence_and_left_alone(toy):
    model, tokenizer = toy
    before = logits_of(model, tokenizer)
    model.is_quantized = True  # what transformers sets on every quantised model
    with pytest.raises(R.CannotDo, match="load the model unquantised"):
        R.orthogonalize(model, torch.ones(32))
    assert torch.equal(logits_of(model, tokenizer), before)


# The paper on the tiny model -----------------------------------------------------------------------------


def check_bars(model, tokenizer, data, chosen):
    rate = lambda kind: R.refusal_rate(R.generate(model, tokenizer, data[kind].test, 24, 100))
    assert rate("harmful") >= 0.85 and rate("harmless") <= 0.10
    with R.ablate(model, chosen.vector):
        assert rate("harmful") <= 0.10
    noise = torch.randn(len(chosen.vector), generator=torch.Generator().manual_seed(1))
    with R.ablate(model, noise):
        assert rate("harmful") >= 0.80
    with R.add(model, chosen.vector, chosen.layer, chosen.coefficient):
        assert rate("harmless") >= 0.85


def test_the_paper_holds_on_the_tiny_model(tiny, data, found):
    check_bars(*tiny, data, found)
    along = [
        R.projections(*tiny, data[kind].test, found.vector, found.position)[:, found.layer] for kind in ("harmful", "harmless")
    ]
    assert R.auroc(*along) > 0.95


@seeds
@pytest.mark.parametrize("seed", range(1, 5))
def test_the_paper_holds_on_other_seeds(seed, data, request):
    if "seeds" not in request.config.getoption("-m"):
        pytest.skip("pytest -m seeds")
    model, tokenizer = R.train_tiny_model(seed)
    means = [R.mean_activations(model, tokenizer, data[kind].train) for kind in ("harmful", "harmless")]
    chosen = R.select_direction(model, tokenizer, R.refusal_directions(*means), data["harmful"].val, data["harmless"].val)
    chosen.coefficient = R.find_dose(
        model, tokenizer, chosen, data["harmless"].val, SimpleNamespace(max_new_tokens=24, batch_size=32, coefficient=None)
    )
    check_bars(model, tokenizer, data, chosen)


# The program -------------------------------------------------------------------------------------------


def program(*arguments, **environment):
    done = subprocess.run([sys.executable, R.__file__, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, **environment}, cwd="/")  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="session")
def saved_tiny(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


SMALL = ("--n-train", 64, "--n-val", 16, "--n-test", 40, "--max-new-tokens", 16)
QUICK = ("--n-train", 16, "--n-val", 4, "--n-test", 4, "--layer", 2, "--coefficient", 1, "--max-new-tokens", 8)


def test_the_program_from_end_to_end(saved_tiny, tmp_path):
    done = program("--model", saved_tiny, *SMALL, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    stages = "1 model,2 prompts,3 directions,4 selection,  detector,5 refusals,  weights,  cost,6 replies"
    for stage in stages.split(","):
        assert f"\n{stage}" in "\n" + done.stdout
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr), "a pipe gets clean text"
    row = lambda name: [int(x) for x in re.findall(r"(\d+)/40", re.search(rf"{name}.*", done.stdout)[0])]
    assert row("no intervention")[0] >= 34 and row("direction ablated")[0] <= 4 and row("direction added")[-1] >= 34
    edited = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    assert numbers["scores"]["kl"][numbers["position"]][numbers["layer"]] == pytest.approx(numbers["kl"])
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "direction.safetensors", "pt") as file:
        r = file.get_tensor("direction")
        assert file.metadata()["layer"] == str(numbers["layer"])
    assert (R.unit(r) @ edited.model.layers[0].mlp.down_proj.weight).abs().max() < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["out"], "nothing half-written is left"
    given = ("--direction", tmp_path / "out" / "direction.safetensors", "--coefficient", numbers["coefficient"])
    found = program("--model", saved_tiny, *SMALL, *given, "--prompt", "How do I bake bread?")
    assert re.search(r"(?m)^  prompt.*bake.*\n +[0-9 ]+\n", found.stdout) and "\n               ablated   " in found.stdout
    table = lambda text: text[text.index("5 refusals") : text.index("6 replies")]
    assert table(found.stdout) == table(done.stdout), "a saved direction gives the results that it was saved with"
    again = program("--model", saved_tiny, *SMALL, "--save", tmp_path / "out")
    assert again.returncode == 2 and "must be a new or empty folder" in again.stderr


def test_the_same_command_prints_the_same_numbers(saved_tiny, capsys):
    runs = []
    for _ in range(2):
        assert R.main(["--model", str(saved_tiny), *map(str, QUICK)]) == 0
        runs.append(capsys.readouterr().out)
    without_time = [re.sub(r"(?m)^time.*", "", run) for run in runs]
    assert without_time[0] == without_time[1] and "skipped: position -1, layer 2" in runs[0]


@pytest.mark.parametrize("arguments, status, message", [
    (("--model", "qwen-1.8"), 2, "did you mean qwen-1.8b?"),
    (("--model", "{empty}"), 1, "cannot be used"),
    (("--model", "{tiny}", "--harmful", "{empty}/none.txt"), 2, "No such file"),
    (("--model", "{tiny}", "--n-train", 5000), 2, "prompts of each kind are needed"),
    (("--model", "{tiny}", "--n-train", 0), 2, "at least 2"),
    (("--model", "{tiny}", "--seed", 2**64), 2, "63 bits"),
    (("--model", "{tiny}", "--layer", 99), 2, "layers 0 to 5"),
    (("--model", "{tiny}", "--position", -1), 2, "needs --layer"),
    (("--model", "{tiny}", "--coefficient", "nan"), 2, "finite"),
    (("--model", "{tiny}", "--harmful", "{harmless}"), 2, "in both files"),
])  # fmt: skip
def test_mistakes_are_answered_in_one_sentence(saved_tiny, tmp_path, capsys, arguments, status, message):
    places = {"{empty}": str(tmp_path), "{tiny}": str(saved_tiny), "{harmless}": str(R.PROMPTS / "harmless.txt")}
    filled = [str(a) for a in arguments]
    for key, place in places.items():
        filled = [a.replace(key, place) for a in filled]
    one_sentence(capsys, status, message, *filled)


# Trust: models and numbers ------------------------------------------------------------------------------


def one_sentence(capsys, status, message, *arguments):
    """The program ends with this status and says this on one line of stderr; returns what else it said."""
    try:
        assert R.main([str(a) for a in arguments]) == status
    except SystemExit as error:  # argparse's way
        assert error.code == status
    out, err = capsys.readouterr()
    *others, line = [line for line in err.splitlines() if not line.startswith(("usage: ", "out of memory: going on"))]
    assert message in line and "error: " in line and not others, err
    return out


@pytest.fixture
def folder(toy, tmp_path):
    """The toy as a user has it: a folder with a model and its tokenizer."""
    for part in toy:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def delete(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:3000])


def configure(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def weigh(change):
    """Change the state dict; change returns the format in which it is then stored."""

    def do(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        if change(weights) == "pickle":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return do


def replace(model, config, **sizes):
    """Put a model of another kind in the folder."""
    sizes |= {"vocab_size": 600, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return lambda folder: getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
BART = {"d_model": 32} | {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
CLASSIFIER = BERT | {"num_key_value_heads": 4}


@pytest.mark.parametrize("damage, message", [
    (delete("config.json"), "model_type"),
    (write("config.json", "{"), "not a valid JSON"),
    (write("config.json", "[]"), "cannot be used"),
    (configure(hidden_size="wide"), "expected int"),
    (configure(num_attention_heads=7), "not a multiple of the number of attention heads"),
    (configure(hidden_act="frob"), "KeyError: 'frob'"),
    (configure(intermediate_size=64), "cannot be used (RuntimeError"),
    (configure(model_type="strange", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}), "custom code"),
    (configure(quantization_config={"quant_method": "gptq", "bits": 4}), "cannot be used"),
    (delete("model.safetensors"), "no file named model.safetensors"),
    (weigh(lambda weights: "pickle"), "no file named model.safetensors"),
    (cut("model.safetensors"), "SafetensorError"),
    (weigh(lambda weights: weights.pop("model.layers.3.mlp.down_proj.weight") * 0), "lacks 1 of its weights, such as model.layers.3.mlp"),
    (weigh(lambda weights: weights["model.layers.3.mlp.down_proj.weight"].fill_(math.nan)), "the logits hold NaN or infinity"),
    (lambda folder: None, "this model hardly refuses harmful prompts (only 0 of 16 train"),
    (delete("tokenizer.json"), "tokenizer"),
    (cut("tokenizer.json"), "JSONDecodeError"),
    (replace("T5ForConditionalGeneration", "T5Config", **T5), "T5Config"),
    (replace("BartForConditionalGeneration", "BartConfig", **BART), "it is no causal model"),
    (replace("LlamaForSequenceClassification", "LlamaConfig", **CLASSIFIER), "it is no causal model"),
    (replace("BertForMaskedLM", "BertConfig", **BERT), "does not add to the stream"),
])  # fmt: skip
def test_a_folder_that_holds_no_chat_model(folder, capsys, damage, message):
    damage(folder)
    one_sentence(capsys, 1, message, "--model", folder, *QUICK)


def test_a_model_that_is_nowhere(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_sentence(capsys, 1, "nobody/nothing cannot be used (OSError", "--model", "nobody/nothing")


@pytest.mark.parametrize("template, message", [
    ("", "no chat template"),
    ("{{ messages[0].content", "TemplateSyntaxError"),
    ("{{ messages[0].content + 1 }}<|assistant|>", "TypeError"),
    ("{% if messages[0].role != 'system' %}{{ raise_exception('A system message first') }}{% endif %}", "A system message first"),
    ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('Users only') }}{% endif %}{{ m.content }}{% endfor %}<|assistant|>", "Users only"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "adds nothing after the instruction"),
    ("Hello <|assistant|>", "leaves out the instruction"),
    ("{% for m in messages %}{{ m.content }}<new>{% endfor %}", "tokens that the model has no embedding for"),
])  # fmt: skip
def test_templates_that_cannot_be_used(toy, folder, capsys, template, message):
    toy[1].add_tokens(["<new>"])
    toy[1].chat_template = template
    for file in folder.glob("*token*"), folder.glob("*template*"):
        for path in file:
            path.unlink()
    toy[1].save_pretrained(folder)
    one_sentence(capsys, 1, message, "--model", folder, *QUICK)


def test_tokens_that_no_prompt_has_are_no_harm(toy):
    model, tokenizer = toy
    before = R.refusal_scores(model, tokenizer, PROMPTS)
    tokenizer.add_tokens(["<image>"])  # Gemma 3 1B has such a token and no embedding for it
    assert torch.equal(R.refusal_scores(model, tokenizer, PROMPTS), before)


def test_one_bos_where_the_tokenizer_and_the_template_both_add_it(toy):
    from tokenizers.processors import TemplateProcessing

    _, tokenizer = toy
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 1)])  # plays the BOS
    tokenizer.chat_template = "<|end|>" + TEMPLATES["brackets"][0]
    assert tokenizer("Hi")["input_ids"][0] == 1
    assert R.tokenize(tokenizer, ["Hi"])["input_ids"][0].tolist().count(1) == 1
    assert 1 not in R.refusal_tokens(tokenizer) + R.template_tail(tokenizer)


OPEN, CLOSED = "<|assistant|><think>\n", "<|assistant|><think>\n\n</think>\n\n"


@pytest.mark.parametrize("ending, said", [
    (CLOSED, []),
    ("{% if enable_thinking is defined and not enable_thinking %}" + CLOSED + "{% else %}" + OPEN + "{% endif %}", ["leave that out"]),
    (OPEN, ["every reply begin with thinking"]),
    ("{{ enable_thinking }}" + OPEN, ["leave that out", "every reply begin with thinking"]),
])  # fmt: skip
def test_thinking_is_turned_off_where_it_can_be_and_told(toy, folder, capsys, ending, said):
    toy[1].chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + ending
    toy[1].save_pretrained(folder)
    out = one_sentence(capsys, 1, "hardly refuses", "--model", folder, *QUICK)
    assert [words for words in ("leave that out", "every reply begin with thinking") if words in out] == said


@pytest.mark.parametrize("arguments, message", [
    (("--n-train", "x"), "invalid whole number value: 'x'"),
    (("--n-train", 1.5), "invalid whole number value: '1.5'"),
    (("--n-val", -3), "at least 1"),
    (("--batch-size", 0), "at least 1"),
    (("--max-new-tokens", 0), "at least 1"),
    (("--layer", 1.5), "invalid int value"),
    (("--layer", -1), "layers 0 to 3"),
    (("--layer", 4), "layers 0 to 3"),
    (("--layer", 2, "--position", -3), "positions -2 to -1"),
    (("--layer", 2, "--position", 0), "positions -2 to -1"),
    (("--coefficient", "x"), "invalid float value"),
    (("--coefficient", 1, "inf"), "finite numbers"),
    (("--seed", "x"), "invalid int value"),
    (("--dtype", "int8"), "invalid choice"),
    (("--device", "tpu"), "no device 'tpu'"),
    (("--device", "cuda:99"), "no device 'cuda:99'"),
    (("--device", "meta"), "no device 'meta'"),
    (("--device", ""), "no device ''"),
    (("--model", "tiny", "--n-train", 8, "--n-val", 53, "--n-test", 100), "152 together"),
    (("--exhaustive",), "about a search"),
    (("--direction", ""), "give one of them"),
])  # fmt: skip
def test_numbers_that_make_no_sense(folder, capsys, monkeypatch, arguments, message):
    keep_all = lambda logits, tokens: logits.new_tensor([1.0, -1.0])[keep_all.calls.pop(0)].expand(len(logits))
    keep_all.calls = [0, 1]  # the toy refuses nothing: let its prompts pass the filter, harmful ones and harmless ones
    monkeypatch.setattr(R, "log_odds", keep_all)
    one_sentence(capsys, 2, message, "--model", folder, *QUICK, *arguments)


def test_directions_that_make_no_sense(saved_tiny, tmp_path, capsys):
    from safetensors.torch import save_file

    notes = {"position": "-1", "layer": "2"}
    cases = [
        (torch.zeros(128), notes, "no direction"), (torch.full((128,), math.nan), notes, "no direction"),
        (torch.ones(64), notes, "the model needs (128,)"), (torch.ones(1, 128), notes, "the model needs (128,)"),
        (torch.ones(128), {}, "is not a direction"), (torch.ones(128), notes | {"layer": "6"}, "layers 0 to 5"),
    ]  # fmt: skip
    for vector, notes, message in cases:
        save_file({"direction": vector}, tmp_path / "d.safetensors", notes)
        few = ("--n-train", 16, "--n-val", 4, "--n-test", 4, "--direction", tmp_path / "d.safetensors")
        one_sentence(capsys, 2, message, "--model", saved_tiny, *few)


def test_models_that_never_and_always_refuse_are_told_so(tiny, found):
    args = R.parse(["--n-train", "16", "--n-val", "4", "--n-test", "4"])
    with R.ablate(*tiny[:1], found.vector), pytest.raises(R.CannotDo, match="hardly refuses harmful .* of 16 train"):
        R.prepare(*tiny, args)
    with R.add(tiny[0], found.vector, found.layer, 2.0), pytest.raises(R.CannotDo, match="refuses nearly everything .* of 16 train"):
        R.prepare(*tiny, args)


def test_prompts_that_are_all_the_same_to_the_model(toy):
    with pytest.raises(R.CannotDo, match="no direction between them"):
        R.select_direction(*toy, torch.zeros(2, 4, 32), PROMPTS, PROMPTS)


def test_numbers_that_overflow_are_no_result(toy):
    model, tokenizer = toy
    model.half()
    with pytest.raises(R.BadUse, match="smaller coefficient"), R.add(model, torch.full((32,), 1e4), 1, 7.0):  # 70 000 > 65 504
        pass
    with R.add(model, torch.full((32,), 1e4), 1, 6.0):
        pass
    model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    for work in (R.mean_activations, R.refusal_scores):
        with pytest.raises(R.CannotDo, match="hold NaN or infinity"):
            work(model, tokenizer, PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("along", [0.0, 1.0, 17.0])  # how much of the massive channel is in r
def test_massive_activations_are_ablated_all_the_same(toy, dtype, along):
    """One channel a thousand times the others, as in Llama 2: what is ablated counts as ablated."""
    model, r = toy[0], torch.randn(32, generator=torch.Generator().manual_seed(0))
    r[3] = along
    model.model.embed_tokens.weight[:, 3] *= 1000
    model.model.layers[1].mlp.down_proj.weight[3] *= 1000
    model.to(dtype)
    with R.ablate(model, r):
        pass
    R.orthogonalize(model, r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_writer_in_fifty_that_is_not_ablated_is_found(dtype):
    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4, initializer_range=0.08))  # fmt: skip
    model.requires_grad_(False).to(dtype)
    r = R.unit(torch.randn(256))
    writers = R.writers(model)
    for left_out in (None, 0, 3, 24, 47, 48):
        hook = lambda module, args, output: R.replace_first(output, R.project_out(R.first(output), r))
        with R.hooked([m.register_forward_hook(hook) for i, m in enumerate(writers) if i != left_out]):
            if left_out is None:
                R.check_erased(model, r)
                continue
            where = f"block {(left_out - 1) // 2}" if left_out else "the embeddings"
            with pytest.raises(R.CannotDo, match=f"written to the stream by {where} of .* of chance"):
                R.check_erased(model, r)


class SmallMemory(TorchDispatchMode):
    """A machine on which no tensor can have more than so many elements."""

    def __init__(self, most):
        super().__init__()
        self.most, self.refused = most, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out


def test_running_out_of_memory_changes_no_result(toy):
    model, tokenizer = toy
    R.writers(model)
    directions, prompts, replies = torch.randn(100, 4, 32), PROMPTS * 2, ["I swim", "", "rain in the dark"] * 2
    estimate = lambda: torch.cat([torch.as_tensor(x).flatten() for x in R.attribution(model, tokenizer, directions, prompts)])
    for most, work in (  # enough for one or two prompts
        (5000, lambda: R.mean_activations(model, tokenizer, prompts)),
        (5000, lambda: R.projections(model, tokenizer, prompts, directions[0, 0])),
        (10_000, lambda: R.refusal_scores(model, tokenizer, prompts)),
        (20_000, estimate),  # it runs out in the middle of a sum
        (20_000, lambda: torch.tensor(R.reply_loss(model, tokenizer, prompts, replies))),
        (20_000, lambda: tokenizer(R.generate(model, tokenizer, prompts, 4), padding=True, return_tensors="pt")["input_ids"]),
    ):
        whole = work()
        with SmallMemory(most) as memory:
            torch.testing.assert_close(work(), whole, atol=1e-4, rtol=1e-4)
        assert memory.refused


def test_no_memory_for_one_prompt(toy, monkeypatch, capsys):
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert R.out_of_memory(error.value), "what a CPU says"
    R.writers(toy[0])
    monkeypatch.setattr(R, "load_model", lambda *arguments: toy)
    with SmallMemory(500):
        one_sentence(capsys, 1, "out of memory, with one prompt at a time", *QUICK)


@pytest.mark.parametrize("kind", ["quantised", "offloaded"])
def test_weights_that_cannot_be_edited_cost_only_what_needs_them(saved_tiny, tmp_path, monkeypatch, capsys, kind):
    load = R.load_model

    def loaded(*arguments):
        model, tokenizer = load(*arguments)
        model.is_quantized = kind == "quantised"  # what transformers sets
        if kind == "offloaded":  # what accelerate leaves of a module between two forward passes
            model.spare = torch.nn.Linear(2, 2, device="meta")
        return model, tokenizer

    monkeypatch.setattr(R, "load_model", loaded)
    out = one_sentence(capsys, 1, "quantised or offloaded weights", "--model", saved_tiny, *QUICK, "--save", tmp_path / "out")
    assert "direction ablated" in out and "6 replies" in out and not (tmp_path / "out").exists()


def test_models_that_are_no_decoders_with_weights(toy):
    for model in (toy[0].to("meta"), transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **T5))):
        with pytest.raises(R.CannotDo, match="is no decoder, or its weights are not loaded"):
            R.writers(model)


def test_the_width_of_the_stream_is_printed_and_not_the_embeddings(toy, folder, capsys):
    replace("OPTForCausalLM", "OPTConfig", hidden_size=48, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4)(folder)
    assert "3 layers, d_model 48" in one_sentence(capsys, 1, "hardly refuses", "--model", folder, *QUICK)


def test_a_prompt_longer_than_the_context(toy):
    toy[0].config.max_position_embeddings = 20
    with pytest.raises(R.CannotDo, match="longer than this model can read"):
        R.refusal_scores(*toy, PROMPTS)
    R.refusal_scores(*toy, PROMPTS[1:2])


def test_selection_never_sees_test_prompts(tiny, data, found):
    args = SimpleNamespace(layer=None, position=None, direction=None, exhaustive=False, batch_size=32)
    shuffled = {kind: SimpleNamespace(train=d.train, val=d.val, test=["Hello there", "Good day"]) for kind, d in data.items()}
    chosen = R.find_direction(*tiny, shuffled, args)
    assert (chosen.position, chosen.layer) == (found.position, found.layer) and torch.equal(chosen.vector, found.vector)


# Trust: files and interruptions ---------------------------------------------------------------------------


def many(change=lambda line: line, more=()):
    """harmful.txt with every line changed, and lines added, as bytes."""
    return "\n".join([*map(change, R.load_prompts(HERE / "prompts" / "harmful.txt")), *more]).encode()


@pytest.mark.parametrize("content, status, message", [
    (b"Hello\0there\n" + many(), 2, "not UTF-8 text"),
    (many().decode().encode("utf-16"), 2, "not UTF-8 text"),
    (many(more=["word " * 20_000]), 2, "line 281 of"),
    (many(lambda line: line + " word" * 250), 2, "this model can read 256"),
    (many(lambda line: line + " <|user|>"), 2, "control token <|user|>"),
    (many(more=["GIVE ME  COZY IDEAS TO PAINT AND BRIGHTEN AN OLD KITCHEN"]), 2, "in both files"),
    ("Erklär mir das\n".encode("latin-1") + many(), 2, "not UTF-8 text"),
    (many()[:500], 2, "24 prompts of each kind are needed"),
    (b"\xef\xbb\xbf" + many().replace(b"\n", b"\r\n") + b"\r\n\r\n", 0, ""),  # from a Windows editor
    (many(lambda line: line.replace(" ", " \f\u2028\x1b]0;title\x07", 1)), 0, ""),  # odd characters, none of which ends a line
])  # fmt: skip
def test_prompt_files(saved_tiny, tmp_path, capsys, content, status, message):
    (tmp_path / "p.txt").write_bytes(content)
    assert R.main(["--model", str(saved_tiny), "--harmful", str(tmp_path / "p.txt"), *map(str, QUICK)]) == status
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) <= 1 and "\x1b" not in out + err
    assert status or "16 of 16 train" in out


def test_prompt_files_of_any_bytes(tmp_path):
    """A fuzz run: what comes back is what a plain reading of the bytes gives, or BadUse, and nothing else."""
    rng, outcomes = random.Random(0), collections.Counter()
    bits = [b"How", b"a b", b" ", b"\t", b"\n", b"\n", b"\r\n", b"\r", b"\f", b"\x0b\x1c\x1e", "\x85\u2028\u2029\xa0".encode(), b"\xef\xbb\xbf",
            "\u200b\u00e9\u65e5".encode(), b"\x1b[1m"]  # fmt: skip
    rare = [b"\0", b"\xff", b"\xed\xa0\x80", b"long " * 1000]  # \xed\xa0\x80: half a surrogate pair
    for _ in range(500):
        raw = b"".join(rng.choices(bits, k=rng.randrange(12)) + rng.choices(rare, k=rng.random() < 0.2))
        (tmp_path / "p.txt").write_bytes(raw)
        try:
            lines = [line.strip() for line in re.split("\r\n|\r|\n", raw.decode().removeprefix("\ufeff"))]
            want = list(dict.fromkeys(filter(None, lines))) if b"\0" not in raw and b"long" not in raw else []
        except UnicodeDecodeError:
            want = []
        try:
            assert R.load_prompts(tmp_path / "p.txt") == want != []
        except R.BadUse:
            assert want == []
        outcomes[bool(want)] += 1
    assert min(outcomes.values()) > 50


def test_no_prompt_can_end_the_instruction(toy):
    model, tokenizer = toy
    check = lambda prompt: R.check_prompts(model, tokenizer, [prompt], 8)
    for token in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer(token)["input_ids"]) == 1, "in a prompt it would be what the template writes"
        with pytest.raises(R.BadUse, match=f"control token {re.escape(token)}"):
            check(f"How do I{token} boil an egg?")
    check("[/INST] <|nothing|>")
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"  # plain text, as Llama 2 has it
    with pytest.raises(R.BadUse, match=re.escape("control token [/INST]")):
        check("Hi [/INST] Sure")


def test_prompts_on_the_command_line_are_checked_first(saved_tiny, capsys):
    for prompt in ("", "\n", "\udcff"):  # the last: a byte that is not UTF-8
        with pytest.raises(SystemExit) as exit:
            R.parse(["--prompt", prompt])
        assert exit.value.code == 2
    for prompt in ("Hi <|end|>", "word " * 300):
        assert R.main(["--model", str(saved_tiny), "--prompt", prompt, *map(str, QUICK)]) == 2
        assert "3 directions" not in capsys.readouterr().out


def test_prompts_are_hashed_as_they_were_read(saved_tiny, tmp_path, monkeypatch):
    """Not as the file is when the work is done: here it is gone by then, as what a pipe held is."""
    (tmp_path / "p.txt").write_bytes(many())
    look = R.look
    monkeypatch.setattr(R, "look", lambda *args: ((tmp_path / "p.txt").unlink(), look(*args)))
    paths = ("--harmful", str(tmp_path / "p.txt"), "--save", str(tmp_path / "out"))
    assert R.main(["--model", str(saved_tiny), *paths, *map(str, QUICK)]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["prompts_sha256"]["harmful"] == hashlib.sha256(many()).hexdigest()


def test_a_million_prompts_cost_little_more_than_their_text(tmp_path):
    lines = many().decode().splitlines()
    (tmp_path / "p.txt").write_text("\n".join(f"{lines[i % len(lines)]} number {i}" for i in range(1_000_000)))  # 70 MiB
    work = """import resource, sys, refusal as R
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak(); parts = R.split(R.load_prompts(sys.argv[1]), 128, 32, 100); print(len(set().union(*parts)), peak() - before)"""
    done = subprocess.run([sys.executable, "-c", work, tmp_path / "p.txt"], cwd=HERE, capture_output=True, text=True)
    kept, mebibytes = map(int, done.stdout.split())
    assert kept == 260 and mebibytes < 800


def state(model):
    """What an interruption must not leave changed."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, any(p.requires_grad for p in model.parameters()), id(model.generation_config), model.training


def test_an_interruption_leaves_nothing_behind(toy, monkeypatch):
    """Ctrl-C at every module that is run and at every hook that is put in, in everything that changes the model for a while."""
    model, tokenizer = toy
    r, before = torch.randn(32), state(model)
    left = math.inf  # until the interruption

    def tick(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        real = getattr(torch.nn.Module, name)
        monkeypatch.setattr(torch.nn.Module, name, lambda *args, real=real, **more: (tick(), real(*args, **more))[1])

    def nested():
        with R.ablate(model, r), R.add(model, r, 1):
            R.mean_activations(model, tokenizer, PROMPTS[:1])

    works = {
        "the means": nested, "the writers": lambda: (R.WRITERS.clear(), R.writers(model)), "the weights": lambda: R.orthogonalize(model, 0 * r + 1),
        "attribution": lambda: R.attribution(model, tokenizer, torch.randn(2, 4, 32), PROMPTS[:1]),
        "replies": lambda: R.generate(model, tokenizer, PROMPTS[:1], 2), "projections": lambda: R.projections(model, tokenizer, PROMPTS[:1], r),
    }  # fmt: skip
    everywhere = torch.nn.modules.module.register_module_forward_pre_hook(tick)
    try:
        for name, work in works.items():
            R.writers(model)
            for at in range(1, 10_000):
                left = at
                try:
                    work()
                    break  # it was over before
                except KeyboardInterrupt:
                    assert state(model) == before, f"{name}, interrupted at {at}"
            assert at > 20, name
            left = math.inf
    finally:
        everywhere.remove()


def test_the_tiny_model_has_a_reply_to_any_opening_word(tmp_path, monkeypatch):
    """As when a teacher has changed the prompts."""
    for kind in ("harmful", "harmless"):
        (tmp_path / f"{kind}.txt").write_text("\n".join(f"Tell me about thing {i}" for i in range(260)))
    monkeypatch.setattr(R, "PROMPTS", tmp_path)
    answered = []
    monkeypatch.setattr(R, "tune", lambda model, tokenizer, lessons, *rest: answered.extend(f(p) for ps, f in lessons for p in ps))
    R.train_tiny_model()
    assert len(answered) == 4 * 128 and set(answered) <= {*R.TINY_REPLIES.values(), R.TINY_REFUSAL}


def test_interrupted_training_gives_the_threads_back(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    monkeypatch.setattr(R, "tune", interrupt)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        R.train_tiny_model()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.mark.parametrize("at", ["1 model", "4 selection", "6 replies"])  # the last: while it saves
def test_ctrl_c_ends_in_one_word(saved_tiny, tmp_path, at):
    command = [sys.executable, R.__file__, "--model", str(saved_tiny), *map(str, QUICK), "--save", str(tmp_path / "out")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in running.stdout:
        if line.startswith(at):
            running.send_signal(signal.SIGINT)
            break
    _, err = running.communicate()
    assert running.returncode == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@contextmanager
def small_disk(limit):
    """While the block runs no file may grow beyond `limit` bytes: the write fails, as on a full disk."""
    now, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (now, most))


@pytest.mark.parametrize("limit", [100, 25_000, 57_000, 100_000])  # ends in the config, the weights, the tokenizer, the numbers
def test_a_full_disk_while_saving(toy, tmp_path, capsys, limit):  # capsys: what is printed meanwhile stays in memory
    _, tokenizer = toy
    tokenizer.add_tokens([f"word{i}" for i in range(300)])
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    work = lambda: R.save(model, tokenizer, SimpleNamespace(vector=torch.ones(8)), {"many": [0] * 40_000}, tmp_path / "out")
    with small_disk(limit), pytest.raises(R.CannotDo, match="could not save to .*File too large.*untouched"):
        work()
    assert not list(tmp_path.iterdir())
    work()
    assert sorted(path.stat().st_size > limit for path in (tmp_path / "out").iterdir())[-1], "this limit is none"


def test_nothing_in_the_way_is_overwritten(tmp_path, toy, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "link.png").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # an empty folder may be replaced, but not by an empty name
    wrong = ("--save=file", "--save=full", "--save=link", "--save=file/below", "--save=", "--save=/", "--save=/proc")
    for argument in (*wrong, "--figure=link.png", "--figure=full/a/b.png"):
        name, _, target = argument.partition("=")
        with pytest.raises(SystemExit) as exit:
            R.parse([name, str(tmp_path / target) if target else ""])
        assert exit.value.code == 2 and "cannot " in capsys.readouterr().err
    for target in ("full", "link", "file"):  # it was not there when the program began
        with pytest.raises(R.CannotDo, match="could not save"):
            R.save(*toy, SimpleNamespace(vector=torch.ones(32)), {}, tmp_path / target)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "x").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link", "link.png"]
    R.save(*toy, SimpleNamespace(vector=torch.ones(32)), {}, R.parse(["--save", "."]).save)
    assert (tmp_path / "empty" / "direction.safetensors").is_file() and len(list(tmp_path.iterdir())) == 5


def test_a_saved_model_that_is_not_the_one_in_memory_is_not_kept(toy, tmp_path):
    model, _ = toy
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)  # hooks are not saved
    with pytest.raises(R.CannotDo, match="does not give the logits"):
        R.save(*toy, SimpleNamespace(vector=torch.ones(32)), {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_output_that_nobody_reads_or_nothing_can_show(saved_tiny):
    command = [sys.executable, R.__file__, "--model", str(saved_tiny), *map(str, QUICK), "--prompt", "Where is 日本?"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"\\u65e5" in done.stdout  # each of these characters is several tokens
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # so that something is left to write when the program ends
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as running:
        running.stdout.readline()
        running.stdout.close()  # as head -1 does
        assert running.wait() == 1 and running.stderr.read() == b""


def test_output_to_a_full_disk(saved_tiny, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert R.main(["--model", str(saved_tiny), *map(str, QUICK)]) == 1
    assert capsys.readouterr().err == "error: the output cannot be written: No space left on device.\n"


def test_a_figure_that_fails_leaves_the_last_one(tmp_path):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "x.svg", (None, ["a"], CHOSEN, traces(5), traces(5, 0.0))
    R.figure(path, *picture)
    before = path.read_bytes()
    with small_disk(len(before) // 2), pytest.raises(R.CannotDo, match="could not draw"):
        R.figure(path, *picture)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_no_name_reaches_the_terminal_raw(saved_tiny, tmp_path, capsys):
    evil = "\x1b]0;owned\x07\r"
    (tmp_path / evil).symlink_to(saved_tiny)
    assert R.main(["--model", str(tmp_path / evil), "--harmful", str(tmp_path / evil / evil)]) == 2
    with pytest.raises(SystemExit):
        R.parse([f"--{evil}"])
    out, err = capsys.readouterr()
    assert "owned" in out and err.count("owned") == 3 and (out + err).replace("\n", "").isprintable()


def test_text_from_a_model_cannot_move_the_cursor():
    for text in ("\x1b[2J\x1b]0;owned\x07", "a\rb\bc\x9bd\u202e", "\n\n  two\tlines\n", "a" * 200_000):
        for width in (5, 20, 10**6):
            assert R.visible(text, width).isprintable() and len(R.visible(text, width)) <= width
    assert R.visible("\x1b[1m", 99) == "\\x1b[1m"


def test_wilson_ends_where_the_score_test_does():
    """The ends are the shares p from which hits/n is exactly z standard errors away: n (hits/n - p)^2 = z^2 p (1 - p)."""
    for n in (1, 2, 7, 30, 1000):
        for hits in {0, 1, n // 3, n // 2, n - 1, n}:
            low, high = R.wilson(hits, n)
            assert 0 <= low <= hits / n <= high <= 1 and (low == 0) == (hits == 0) and (high == 1) == (hits == n)
            for p in (low, high):
                assert n * (hits / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p), abs=1e-12)


def test_mcnemar_counts_all_outcomes():
    """All 2^n ways in which n changed pairs can fall, in exact arithmetic: how many are as uneven as this one?"""
    for n in range(11):
        ways = collections.Counter(sum(way) for way in itertools.product((0, 1), repeat=n))
        for lost in range(n + 1):
            uneven = sum(count for k, count in ways.items() if abs(2 * k - n) >= abs(2 * lost - n))
            before, after = [True] * lost + [False] * (n - lost) + [True, False], [False] * lost + [True] * (n - lost) + [True, False]
            assert R.mcnemar(before, after) == float(fractions.Fraction(uneven, 2**n))


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()])
def test_both_projections_are_the_same_formula(device):
    """x - (x . r) r and W - r (r^T W), against float64, for random sizes, scales and dtypes; and what does not write is not touched."""
    for seed in range(12):
        torch.manual_seed(seed)
        d, dtype = 4 * int(torch.randint(1, 20, ())), [torch.float32, torch.bfloat16][seed % 2]
        sizes = dict(hidden_size=d, intermediate_size=4 + 3 * seed, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, mlp_bias=True)).eval().requires_grad_(False).to(device, dtype)
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 10.0 ** (seed % 5 - 2) + 0.1)
        before = {name: p.clone() for name, p in model.named_parameters()}
        r = torch.randn(d, device=device) * 10.0 ** (seed - 6)
        names, unit = R.orthogonalize(model, r), r.cpu().double() / r.cpu().double().norm()
        assert set(names) == {"model.embed_tokens.weight", *(f"model.layers.0.{x}" for x in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.down_proj.bias"))}
        for name, p in model.named_parameters():
            W = before[name].double().cpu().movedim(0 if "layers" in name else -1, -1)  # (..., d_model): what writes comes last
            close = dict(atol=4 * torch.finfo(dtype).eps * W.abs().max().item(), rtol=4 * torch.finfo(dtype).eps)
            if name not in names:
                assert torch.equal(p, before[name])
                continue
            want = W - (W @ unit)[..., None] * unit
            torch.testing.assert_close(p.double().cpu().movedim(0 if "layers" in name else -1, -1), want, **close)
            torch.testing.assert_close(R.project_out(W.to(device, dtype), R.unit(r)).double().cpu(), want, **close)


def test_docstring_examples():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(R):
        example.globs |= dict(zip(("model", "tokenizer"), small_model(hidden_size=4, num_hidden_layers=3, num_attention_heads=1)))
        runner.run(example)
    assert runner.summarize().failed == 0 < runner.tries


# %% The search: the plain definitions, and refusal.py against them ------------------------------------
#
# The oracle does what the paper says in the plainest way and in the authors' manner: every candidate, three
# sweeps, full forward passes, hooks at the blocks' inputs and at the sublayers' outputs.  It is slow on purpose.


@torch.no_grad()
def plain_logits(model, tokenizer, prompts, ablated=None, added=None, layer=None, batch_size=32):
    """Logits for the first token of the reply, (prompt, vocab), float64, with a vector ablated, or added at one layer."""
    handles, rows = [], []
    if added is not None:
        handles = [model.model.layers[layer].register_forward_pre_hook(lambda m, args: (args[0] + added.to(args[0]), *args[1:]))]
    if ablated is not None:
        r = (ablated / ablated.norm().clamp(min=1e-8)).to(model.device, model.dtype)
        erase = lambda x: x - (x @ r)[..., None] * r  # (batch, seq, d_model)
        for block in model.model.layers:
            handles.append(block.register_forward_pre_hook(lambda m, args: (erase(args[0]), *args[1:])))
            handles.append(block.self_attn.register_forward_hook(lambda m, args, out: (erase(out[0]), *out[1:])))
            handles.append(block.mlp.register_forward_hook(lambda m, args, out: erase(out)))
    try:
        for start in range(0, len(prompts), batch_size):
            batch = R.tokenize(tokenizer, prompts[start : start + batch_size]).to(model.device)
            rows.append(model(**batch).logits[:, -1].double().cpu())  # (batch, seq, vocab) -> (batch, vocab)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(rows)


def plain_score(logits, tokens):
    """Mean of log(p / (1 - p))."""
    p = logits.softmax(-1)[:, tokens].sum(-1)
    return (p.log() - (1 - p).log()).mean().item()


def plain_kl(p_logits, q_logits, epsilon=0.0):
    """Mean KL divergence; the authors' code has epsilon = 1e-6 inside both logarithms."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    if epsilon:
        p, q = (p.exp() + epsilon).log(), (q.exp() + epsilon).log()
    return (p_logits.softmax(-1) * (p - q)).sum(-1).mean().item()


def plain_winner(bypass, kl, induce):
    """The paper's filters; if nothing passes, without the one on induce: (position, layer), or None."""
    n_positions, n_layers = bypass.shape
    for floor in (0, -float("inf")):
        passing = [
            (bypass[i, l].item(), i - n_positions, l)
            for i in range(n_positions)
            for l in range(int(0.8 * n_layers))
            if kl[i, l] <= 0.1 and induce[i, l] >= floor
        ]
        if passing:
            return min(passing)[1:]


def plain_select(model, tokenizer, directions, harmful_val, harmless_val, only=None):
    """Three sweeps over all candidates (or `only` some): bypass, kl, induce, each (position, layer), and the winner."""
    n_positions, n_layers, _ = directions.shape
    tokens, base = R.refusal_tokens(tokenizer), plain_logits(model, tokenizer, harmless_val)
    bypass, kl, induce = torch.full((3, n_positions, n_layers), float("nan"), dtype=torch.float64)
    for position, layer in only or [(i - n_positions, l) for i in range(n_positions) for l in range(n_layers)]:
        v, at = directions[position, layer], (position, layer)
        bypass[at] = plain_score(plain_logits(model, tokenizer, harmful_val, ablated=v), tokens)
        kl[at] = plain_kl(base, plain_logits(model, tokenizer, harmless_val, ablated=v))
        induce[at] = plain_score(plain_logits(model, tokenizer, harmless_val, added=v, layer=layer), tokens)
    return bypass, kl, induce, plain_winner(bypass, kl, induce)


@torch.no_grad()
def plain_means(model, tokenizer, prompts, batch_size=1):
    """Mean block inputs over the template's tail, (position, layer, d_model), float64; one prompt at a time, so no padding."""
    n, layers = len(R.template_tail(tokenizer)), model.model.layers
    total = torch.zeros(n, len(layers), model.config.hidden_size, dtype=torch.float64)

    def keep(layer):
        def hook(module, args):
            total[:, layer] += args[0][:, -n:].double().cpu().sum(0)  # (batch, seq, d_model) -> (position, d_model)

        return hook

    handles = [block.register_forward_pre_hook(keep(layer)) for layer, block in enumerate(layers)]
    for start in range(0, len(prompts), batch_size):
        model(**R.tokenize(tokenizer, prompts[start : start + batch_size]).to(model.device))
    for handle in handles:
        handle.remove()
    return total / len(prompts)


def spearman(x, y):
    """Rank correlation."""
    return torch.corrcoef(torch.stack([v.argsort().argsort().double() for v in (x, y)]))[0, 1].item()


@pytest.fixture(scope="module")
def search(tiny):
    """The tiny model with a few prompts, their means, and what the oracle says about every candidate."""
    model, tokenizer = tiny
    val, train = {}, {}
    for kind in ("harmful", "harmless"):
        train[kind], val[kind], _ = R.split(R.load_prompts(R.PROMPTS / f"{kind}.txt"), 128, 32, 100)
    means = [plain_means(model, tokenizer, train[kind]) for kind in ("harmful", "harmless")]
    arguments = (model, tokenizer, means[0] - means[1], val["harmful"], val["harmless"])
    return SimpleNamespace(train=train, means=means, arguments=arguments, oracle=plain_select(*arguments))


def test_mean_activations_are_the_plain_means(search):
    for mean, kind in zip(search.means, ("harmful", "harmless")):
        ours = R.mean_activations(*search.arguments[:2], search.train[kind], batch_size=7)
        assert ours.dtype == torch.float64 and torch.allclose(ours, mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_select_direction_agrees_with_the_plain_definitions(search, exhaustive):
    chosen, oracle = R.select_direction(*search.arguments, exhaustive=exhaustive), search.oracle
    for name, plain in zip(("bypass", "kl", "induce"), oracle):
        measured = chosen.scores[name].isfinite()
        assert measured.any() and (chosen.scores[name].double() - plain)[measured].abs().max() < 1e-3, name
        assert getattr(chosen, name) == pytest.approx(plain[chosen.position, chosen.layer].item(), abs=1e-3)
    assert (chosen.position, chosen.layer) == oracle[3] == chosen.early
    assert chosen.vector.equal(search.arguments[2][oracle[3]].float())


def test_an_exhaustive_search_says_where_an_early_stop_would_have_ended(search):
    for patience in (1, 4):
        whole = R.select_direction(*search.arguments, patience=patience, exhaustive=True)
        early = R.select_direction(*search.arguments, patience=patience)
        assert whole.early == (early.position, early.layer) == early.early


def test_what_was_not_measured_is_not_chosen():
    """Not even where the filters pass: argmin takes NaN for the least of all."""
    known, nan = torch.zeros(1, 5), math.nan
    assert R.choose({"bypass": torch.tensor([[nan, -1, -2, nan, -3]]), "kl": known, "induce": known}) == (-1, 2)
    assert R.choose({"bypass": known * nan, "kl": known, "induce": known}) is None


def test_without_a_candidate_that_induces_the_filter_is_relaxed_and_says_so(search, monkeypatch):
    monkeypatch.setattr(R, "INDUCE_MIN", 1e6)
    bypass, kl, induce, _ = search.oracle
    for chosen in (R.select_direction(*search.arguments, exhaustive=exhaustive) for exhaustive in (True, False)):
        assert chosen.relaxed and (chosen.position, chosen.layer) == plain_winner(bypass, kl, induce + float("inf"))


def test_without_a_candidate_that_leaves_the_model_intact_it_stops(search, monkeypatch):
    monkeypatch.setattr(R, "KL_MAX", -1.0)  # not 0: rounding alone can leave a KL of zero or just below
    with pytest.raises(R.CannotDo, match="KL"):
        R.select_direction(*search.arguments)


def test_attribution_ranks_candidates_by_what_erasing_them_does(search):
    _, estimate = R.attribution(*search.arguments[:4])
    change = search.oracle[0] - plain_score(
        plain_logits(*search.arguments[:2], search.arguments[3]), R.refusal_tokens(search.arguments[1])
    )
    for position in range(len(estimate)):  # from layer 1 on: at layer 0 there is nothing to erase
        assert spearman(estimate[position, 1:], change[position, 1:]) > 0.8


def test_attribution_is_the_derivative_of_erasing_a_little(search):
    model, tokenizer, directions, harmful, _ = search.arguments
    (_, estimate), epsilon, scores = R.attribution(model, tokenizer, directions, harmful), 0.005, []
    r = R.unit(directions[-1, 3])
    for sign in (1, -1):  # o' = o -+ epsilon (o . r) r at every writer
        hook = lambda m, args, out: R.replace_first(out, R.first(out) - sign * epsilon * (R.first(out) @ r)[..., None] * r)
        with R.hooked([writer.register_forward_hook(hook) for writer in R.writers(model)]):
            scores.append(plain_score(plain_logits(model, tokenizer, harmful), R.refusal_tokens(tokenizer)))
    assert (scores[0] - scores[1]) / (2 * epsilon) == pytest.approx(estimate[-1, 3].item(), rel=2e-2)


@real
@pytest.mark.skipif(
    not (os.environ.get("REFUSAL_MODEL") and os.environ.get("REFUSAL_REFERENCE")),
    reason="set REFUSAL_MODEL and REFUSAL_REFERENCE to folders",
)
def test_the_search_agrees_with_the_authors_code_on_a_real_model():
    """Qwen2.5-Coder-0.5B-Instruct: every measured candidate against the recorded scores, and the near miss as the winner."""
    folder = Path(os.environ["REFUSAL_REFERENCE"])
    prompts = json.loads((folder / "prompts.json").read_text())
    recorded = json.loads((folder / "authors_scores.json").read_text())["scores"]
    authors = {(s["position"], s["layer"]): (s["refusal_score"], s["steering_score"], s["kl_div_score"]) for s in recorded}
    model, tokenizer = R.load_model(os.environ["REFUSAL_MODEL"], "cpu", "float32")
    means = [R.mean_activations(model, tokenizer, prompts[kind]) for kind in ("harmful_train", "harmless_train")]
    directions, harmless = means[0] - means[1], prompts["harmless_val"]
    chosen = R.select_direction(model, tokenizer, directions, prompts["harmful_val"], harmless)
    measured = [at for at in authors if chosen.scores["bypass"][at].isfinite()]
    gap = {name: max(abs(chosen.scores[name][at].item() - authors[at][i]) for at in measured if chosen.scores[name][at].isfinite())
           for i, name in enumerate(("bypass", "induce", "kl"))}  # fmt: skip
    print(f"{len(measured)} candidates measured; largest difference from the authors' code:", gap)
    assert gap["bypass"] < 0.02 and gap["induce"] < 0.02 and gap["kl"] < 0.02
    assert (chosen.position, chosen.layer) == (-1, 16) and chosen.relaxed
    base = plain_logits(model, tokenizer, harmless)
    for at in ((-1, 16), (-1, 18)):  # the rest of the KL's difference is their epsilon
        ablated = plain_logits(model, tokenizer, harmless, ablated=directions[at])
        print(at, "KL exact", plain_kl(base, ablated), "with epsilon", plain_kl(base, ablated, 1e-6), "authors", authors[at][2])
        assert plain_kl(base, ablated, 1e-6) == pytest.approx(authors[at][2], abs=2e-3)
        assert chosen.scores["kl"][at].item() == pytest.approx(plain_kl(base, ablated), abs=1e-3)


# --- Pictures (section 11) -----------------------------------------------------------------------------

CHOSEN = SimpleNamespace(position=-1, layer=1, relaxed=None)
ESCAPE = re.compile(r"\033\[[0-9;]*m")


def small_scores():
    """Two positions x five layers with one of everything: a winner, KL, induce, a late layer, unmeasured."""
    nan = math.nan
    return {
        "bypass": torch.tensor([[4.0, 1.0, nan, nan, 0.0], [2.0, -3.0, -4.0, -1.0, -0.5]]),
        "induce": torch.tensor([[-1.0, 1.0, nan, nan, 1.0], [1.0, 2.0, 1.0, 1.0, 1.0]]),
        "kl": torch.tensor([[0.01, 0.05, nan, nan, 0.01], [0.0, 0.05, 5.0, nan, 0.01]]),
    }


def big_scores(n_layers, n_positions=5):
    shape, generator = (n_positions, n_layers), torch.Generator().manual_seed(0)
    scores = {name: 5 * torch.randn(shape, generator=generator) for name in ("bypass", "induce")}
    scores["kl"] = torch.rand(shape, generator=generator)
    scores["bypass"][0, ::3] = math.nan
    return scores


def traces(n_layers, slope=1.0, prompts=4):
    x = torch.arange(n_layers + 1.0).expand(prompts, -1) * slope
    return {"harmful": x + torch.tensor([[-1.0], [1.0]]).repeat(prompts // 2, 1), "harmless": 0 * x}


def test_heat_map_is_this_text():
    assert R.heat_map(small_scores(), "bypass", ["<|end|>", "\n"], CHOSEN) == "\n".join([
        R.MAPS["bypass"],
        "layer             0  1  2  3  4",
        " -2 <|end|>       9< 6  .  .  5>",
        " -1 \\n            7  1* 0x 3  4>",
        "-4 0123456789 4  * winner, x KL>0.1, < induce<0, > late, . unmeasured",
    ])  # fmt: skip


def test_heat_map_of_kl_is_centred_on_the_filter():
    rows = [line.split() for line in R.heat_map(small_scores(), "kl", ["a", "b"], CHOSEN).splitlines()[2:5]]
    assert rows[0] == ["-2", "a", "0<", "2", ".", ".", "0>"] and rows[1] == ["-1", "b", "0", "2*", "9x", ".", "0>"]
    assert rows[2][:3] == ["0", "0123456789", "0.2"]  # KL 0 to 0.1 is 0 to 4, above is broken


def test_heat_map_in_colour_is_the_same_text_in_colours():
    plain, text = (R.heat_map(small_scores(), "bypass", ["<|end|>", "\n"], CHOSEN, colour) for colour in (False, True))
    assert [line.rstrip() for line in ESCAPE.sub("", text).splitlines()] == plain.splitlines()
    for cell, code in (("9< ", R.PALETTE[9]), ("0x ", R.PALETTE[0]), ("1* ", R.PALETTE[R.WINNER])):
        assert f"\033[{code}m{cell}\033[0m" in text
    relaxed = SimpleNamespace(position=-1, layer=1, relaxed="yes")  # then nothing is out for its induce
    assert "<" not in R.heat_map(small_scores(), "bypass", ["a", "b"], relaxed).splitlines()[2]


def test_heat_map_in_single_columns_keeps_the_marks():
    lines = R.heat_map(small_scores(), "bypass", ["a", "b"], CHOSEN, width=25).splitlines()
    assert [line[18:] for line in lines[1:4]] == ["0", "<6..>", "7*x3>"]


def test_heat_map_where_nothing_was_measured():
    scores = {name: torch.full((1, 4), math.nan) for name in ("bypass", "induce", "kl")}
    for name in scores:
        assert R.heat_map(scores, name, ["x"], CHOSEN).splitlines()[2] == " -1 x             .  .  .  ."


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("n_layers", [6, 24, 60, 100])
def test_pictures_fit(width, n_layers):
    scores, tokens = big_scores(n_layers), ["<|start_header_id|>", "\n\n", "｜終わり｜", "", "\x1b[31m"]
    before, after = traces(n_layers, 1e4), traces(n_layers, 0.0)
    for colour in (False, True):
        pictures = [R.heat_map(scores, name, tokens, CHOSEN, colour, width) for name in R.MAPS]
        pictures.append(R.layer_plot(before, after, n_layers - 2, colour, width))
        pictures.append(R.paint(["\u0301", "日本語", " word", "\n", "", "-" * 300] * 20, torch.randn(101), 0.0, 1.0, colour, width))
        for line in "\n".join(pictures).splitlines():
            assert R.columns(ESCAPE.sub("", line)) <= width
            codes = ESCAPE.findall(line)
            assert not codes or colour
            assert all((code == "\033[0m") == bool(i % 2) for i, code in enumerate(codes)) and len(codes) % 2 == 0
            assert "\033" not in ESCAPE.sub("", line)  # a token's own control characters never reach the terminal
    shown = R.heat_map(scores, "bypass", tokens, CHOSEN, False, width).splitlines()[1:-1]
    if n_layers <= 60:
        assert len(shown) == 1 + len(tokens)  # one row a position, not folded


def test_layer_plot_is_this_text():
    assert R.layer_plot(traces(4), traces(4, 0.0), layer=2, height=6).splitlines()[1:] == [
        "layer             0  1  2  3  4",
        "                5             :::",  # a mean of 0, 1, .., 4 and a spread of 1
        "                           :::###",
        "                     :::######:::",
        "                  :::###:::",
        "                0 ###oooooooooooo",  # harmless prompts stay at 0, where the ablated ones are
        "               -1 :::",
    ]


def test_layer_plot_without_spread():
    for x in (torch.zeros(1, 4), torch.full((1, 4), 7.0)):
        assert R.layer_plot({"harmful": x, "harmless": x}, {"harmful": 0 * x, "harmless": 0 * x}, 0, height=2).count("#") == 13


def test_paint_is_this_text():
    tokens, values = ["How", " do", " I", "\n", "x"], torch.tensor([-1.0, -0.1, 0.0, 5.0, math.nan])
    assert R.paint(tokens, values) == "How do I\\nx\n0  4  5 9 .\nx . r: -1 0123456789 1"
    assert R.paint(tokens, values, middle=1.0, reach=2.0, width=6).splitlines()[:4] == ["How do", "0  2  ", " I\\nx", "2 9 ."]
    painted = R.paint(tokens, values, colour=True)
    assert ESCAPE.sub("", painted).splitlines()[0] == "How do I\\nx" and painted.startswith(f"\033[{R.PALETTE[0]}mHow\033[0m")
    assert painted.splitlines()[0].endswith("x")  # NaN has no colour


def test_replies_are_stacked_to_fit(toy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(R, "generate", lambda model, tokenizer, prompts, *_: ["日本語" * 40, "word " * 60, "", "a\x1b[31m\nb"])
    chosen, args = SimpleNamespace(vector=torch.ones(32), layer=1, coefficient=1.0), SimpleNamespace(max_new_tokens=8, batch_size=8)
    whole, cut = (R.examples(*toy, ["p"] * 4, chosen, args, most) for most in (None, 1))
    assert max(R.columns(line) for line in whole.splitlines()) in range(60, 68)  # 80 less the margin of 13
    assert whole.count("日本語") > 100 and whole.count("word") == 180
    assert cut.count("\n") == 4 * 4 - 1 and cut.count(" ...") == 6
    assert cut.splitlines()[-4:] == ["p", *(f"  {name:<10}a\\x1b[31m b" for name in ("as it is", "ablated", "added"))]


@pytest.mark.parametrize("tty, no_colour, term, want", [
    (True, None, "xterm", True), (True, "", "xterm", True), (True, "1", "xterm", False),
    (True, None, "dumb", False), (False, None, "xterm", False),
])  # fmt: skip
def test_wants_colour(monkeypatch, tty, no_colour, term, want):
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour is not None:
        monkeypatch.setenv("NO_COLOR", no_colour)
    assert R.wants_colour(SimpleNamespace(isatty=lambda: tty)) is want


def luminance(n):
    """Relative luminance (WCAG) of a colour of the 256-colour cube."""
    steps = [0, 95, 135, 175, 215, 255]
    rgb = [steps[i] / 255 for i in ((n - 16) // 36, (n - 16) // 6 % 6, (n - 16) % 6)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_have_contrast():
    contrast = lambda a, b: (max(a, b) + 0.05) / (min(a, b) + 0.05)
    for code in R.PALETTE:
        ink, paper = map(int, re.findall(r"[34]8;5;(\d+)", code))
        assert contrast(luminance(ink), luminance(paper)) >= 4.5


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    for name, scores in (("search", small_scores()), ("given", None)):
        path = tmp_path / f"{name}.{suffix}"
        R.figure(path, scores, ["$a$", "\n"], CHOSEN, traces(5), traces(5, 0.0))
        assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    with pytest.raises(R.CannotDo, match="could not draw to"):
        R.figure(tmp_path / "missing" / f"x.{suffix}", None, ["a"], CHOSEN, traces(5), traces(5, 0.0))


def test_figure_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert R.main(["--figure", str(tmp_path / "x.png")]) == 1
    assert "needs matplotlib, which is not installed" in capsys.readouterr().err


# A real model ------------------------------------------------------------------------------------------


@real
@pytest.mark.skipif("REFUSAL_MODEL" not in os.environ, reason="REFUSAL_MODEL=folder pytest -m real")
def test_the_paper_holds_on_a_real_model(capsys):
    assert R.main(["--model", os.environ["REFUSAL_MODEL"], "--n-train", "64", "--n-val", "16", "--n-test", "50"]) == 0
    out = capsys.readouterr().out
    count = lambda row: [int(x) for x in re.findall(r"(\d+)/50", re.search(rf"{row}.*", out)[0])]
    (harmful, harmless), ablated, added = count("no intervention"), count("direction ablated")[0], count("direction added")[0]
    assert ablated <= 0.1 * harmful and added - harmless >= 25
    assert "the same model" in out


# %% Exercises ----------------------------------------------------------------------------------------------
#
# `python test_refusal.py blank student.py` writes refusal.py with the bodies of these functions left out, and
# `REFUSAL=student.py pytest -k exercise_3` grades what a student has put there.  A grader has inputs of its own, an oracle
# that never calls the solution, and oracles in place of the other exercises' functions, so that each can be solved alone.

EXERCISES = {
    "1": "template_tail", "2": "mean_activations", "3": "refusal_directions", "4a": "project_out", "4b": "ablate", "5": "add",
    "6": "log_odds", "7": "kl_divergence", "8": "choose", "9a": "erase", "9b": "orthogonalize",
}  # fmt: skip


def blank(source, target="student.py"):
    """The source with the body of every exercise function, after its docstring, replaced by a line that raises."""
    lines, number = source.splitlines(keepends=True), {name: n for n, name in EXERCISES.items()}
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in number:
            n = number[node.name]
            task = f"exercise {n}: {node.name} is yours to write; grade it with REFUSAL={Path(target).name} pytest -k exercise_{n}"
            lines[node.body[0].end_lineno : node.end_lineno] = [f"    raise NotImplementedError({json.dumps(task)})\n"]
    return "".join(lines)


def write_blank(target):
    """python test_refusal.py blank FILE: write the student's copy; the exit status."""
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(blank((HERE / "refusal.py").read_text(encoding="utf-8"), target))
    except OSError as error:
        print(f"error: cannot write {target} ({error.strerror}): name a new file.", file=sys.stderr)
        return 2
    print(f"{target}: {len(EXERCISES)} exercises; grade the first with REFUSAL={target} pytest -k exercise_1")
    return 0


def check(got, want, what, advice="", **slips):
    """Fail with words that teach: the shape first, then finite, then the value, and the usual slip if it is one of `slips`.

    slips: what the value would be after a usual mistake, by the name of the mistake in SLIPS; advice: if it is none of them.
    """
    if not isinstance(got, torch.Tensor):
        pytest.fail(f"{what} is {type(got).__name__}, and a tensor of shape {tuple(want.shape)} is wanted.", pytrace=False)
    same = lambda a, b: a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-4, rtol=1e-3)
    hint = " ".join(SLIPS[name] for name, wrong in slips.items() if same(got, wrong)) or advice
    if got.shape != want.shape:
        pytest.fail(f"{what} has shape {tuple(got.shape)}, and {tuple(want.shape)} is wanted. {hint}", pytrace=False)
    if not got.isfinite().all():
        pytest.fail(f"{what} holds NaN or infinity. {hint}", pytrace=False)
    if not same(got, want):
        largest = (got.double() - want.double()).abs().max().item()
        pytest.fail(f"{what} has the right shape and wrong values (off by up to {largest:.3g}). {hint}", pytrace=False)


def fail_if(mistaken, slip):
    if mistaken:
        pytest.fail(SLIPS[slip], pytrace=False)


SLIPS = {
    "generation": "The generation prompt is part of the tail: that is where the model has yet to answer (add_generation_prompt).",
    "backwards": "The right tokens in the wrong order: position -1, the last token of the prompt, comes last.",
    "instruction": "A token of the instruction is in it: compare prompts whose last characters differ.",
    "anywhere": "Positions count from each prompt's own end, and that may be anywhere: arrange gives it as `last`.",
    "leaving": "This is what leaves each block: layer l is the stream that enters block l.",
    "layers first": "Layers and positions are swapped: (position, layer, d_model).",
    "mean of means": "This is a mean of batch means: batches of unequal size must not count alike, so sum and divide once.",
    "a sum": "This is the sum: divide by the number of prompts.",
    "harmless first": "The sign: harmful - harmless, so that adding it makes the model refuse.",
    "too early": "Do not normalise here: addition needs the length of the difference.",
    "averaged": "There is one candidate for every position: do not average over them.",
    "component": "This is the component along r; wanted is what is left without it.",
    "mirror": "This is the reflection, twice too much: subtract (x . r) r once.",
    "in place": "You changed the tensor in place, and others still hold it: make a new one.",
    "no effect": "Nothing has changed: a hook's return value replaces what it was given, so return it, and yield inside `with hooked(...)`.",
    "no yield": "A context manager yields once: what comes before is done when the with block begins, what comes after when it ends.",
    "not erased": "Every writer's output (or weight and bias) must lose its part along the unit vector; what enters the blocks is not enough.",
    "no gradients": "Or autograd has recorded nothing: trace_writers and plan_edits work inside `with differentiable(model):`.",
    "length": "Did you forget to normalise? direction may have any length, and only a unit vector projects.",
    "inputs only": "Only what enters the blocks is projected: in the middle of each block, and at its end, r is back. Hook the writers.",
    "left behind": "After the with block the model is not what it was: remove every hook, whatever happened.",
    "unit added": "You added a unit vector: add `vector` with its own length.",
    "next layer": "This is added to what leaves block `layer`, one layer late: hook what enters it.",
    "last only": "This is added at the last position only: add it at every position.",
    "log p": "This is log p: the log-odds are log p - log(1 - p).",
    "each alone": "Do not add up the log-odds of single tokens: p is the probability of all of them together.",
    "plain p": "This is the probability, or its odds: take the logarithm.",
    "reversed": "This is KL(q || p): the average is under p, the first argument.",
    "not summed": "This is the mean over the vocabulary: the divergence is a sum, weighted by p.",
    "epsilon": "An epsilon inside the logarithm biases KL low: take log_softmax of the logits.",
    "unmeasured": "NaN is what was not measured, and argmin takes it for the least: a candidate with a NaN never wins.",
    "edge": "A candidate whose induce is exactly INDUCE_MIN passes.",
    "broken": "This candidate breaks the model: drop what has KL > KL_MAX.",
    "late": "This candidate is too late: only layers below int(LATE * n_layers) may win.",
    "front": "Count the position from the end: -1 is the last.",
    "strict": "Nothing passes all the filters here: leave out the one on induce, and only that one.",
    "weak": "This candidate does not induce refusal, and another one does: drop what has induce < INDUCE_MIN.",
    "transpose": "This is the transpose's projection: a nn.Linear stores (out, in), and it is the axis given by `axis` that writes.",
    "swapped": "u and w are swapped: W . u says how much there is, and that many w are subtracted.",
    "one vector": "Before a norm u and w differ: W . u says how much there is, and that many w are subtracted.",
    "biases": "The biases write to the stream, too.",
    "head": "The unembedding was edited with the embedding: they were tied, and it only reads. Untie it first.",
    "embeddings": "The embeddings write to the stream, too.",
}  # fmt: skip


def known_tail(tokenizer):
    return tokenizer.convert_tokens_to_ids(["\u010a", "<|assistant|>"])  # of the toy's own template


def known_projection(x, r):
    return (x.float() - torch.einsum("...i,i,j->...j", x.float(), r, r)).to(x.dtype)


def known_erase(W, axis, u, w):
    return W - torch.tensordot(W, u, dims=([axis], [0])).unsqueeze(axis) * w.view([-1 if a == axis else 1 for a in range(W.ndim)])


@torch.no_grad()
def edit_by_hand(model, r, forget="nothing", untie=True):
    """Orthogonalize a Llama, module by module; returns the names of the edited parameters.  forget, untie: usual mistakes."""
    if untie:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    edited = []
    for name, p in model.named_parameters():
        if re.search(r"(embed_tokens|o_proj|down_proj)\.", name) and not re.search(forget, name):
            p.copy_(known_erase(p, int("embed" in name), r, r))
            edited.append(name)
    return edited


def exercise(number):
    """Make a grader a test: with oracles in place of the other exercises' functions, and a blank told in one line."""

    def make(grader):
        def test(monkeypatch):
            for name, oracle in (("template_tail", known_tail), ("project_out", known_projection), ("erase", known_erase)):
                if name != EXERCISES[number]:
                    monkeypatch.setattr(R, name, oracle)
            lesson = None
            try:
                grader()
            except NotImplementedError as error:  # the blank
                lesson = str(error)
            except R.CannotDo as error:  # from check_erased and other checks that an answer calls
                lesson = f"{error} {SLIPS['no gradients' if 'one stream' in str(error) else 'not erased']}"
            except TypeError as error:
                if "not an iterator" not in str(error):
                    raise
                lesson = SLIPS["no yield"]
            if lesson:
                pytest.fail(lesson, pytrace=False)

        test.__name__ = grader.__name__
        return test

    return make


@exercise("1")
def test_exercise_1_template_tail():
    for name, (template, tail) in TEMPLATES.items():
        _, tokenizer = small_model()
        tokenizer.chat_template, want = template, tokenizer.convert_tokens_to_ids(tail)
        got = R.template_tail(tokenizer)
        if not isinstance(got, list):
            pytest.fail(f"the tail is {type(got).__name__}, and a list of token ids is wanted.", pytrace=False)
        fail_if(len(want) > 1 and got == want[::-1], "backwards")
        fail_if(got[-len(want) :] == want and len(got) > len(want), "instruction")
        fail_if(got != want and (not got or got == want[: len(got)]), "generation")
        if got != want:
            pytest.fail(f"the tail of the template {name!r} is {tail}, and not {tokenizer.convert_ids_to_tokens(got)}", pytrace=False)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        got = R.template_tail(tokenizer)
    except R.CannotDo:
        return
    pytest.fail(f"a template that adds nothing must raise CannotDo, and not give {got}.", pytrace=False)


@exercise("2")
def test_exercise_2_mean_activations():
    model, tokenizer = small_model(8.0)
    means, leaving, n = [], [], len(PROMPTS)
    for prompt in PROMPTS:  # one by one, hidden states as transformers gives them
        with torch.no_grad():
            states = stream(model, {"input_ids": R.tokenize(tokenizer, [prompt])["input_ids"]})
        tail = torch.stack([state[0, -2:].double() for state in states], dim=1)  # (position, n_layers + 1, d_model)
        means, leaving = [*means, tail[:, :-1]], [*leaving, tail[:, 1:]]
    by_length = sorted(range(n), key=lambda i: -len(PROMPTS[i]))  # as the batches are
    uneven = (sum(means[i] for i in by_length[:2]) / 2 + means[by_length[2]]) / 2
    want = sum(means) / n
    got = R.mean_activations(model, tokenizer, PROMPTS, batch_size=2)
    check(got, want, "the mean", SLIPS["anywhere"], **{
        "leaving": sum(leaving) / n, "layers first": want.transpose(0, 1), "mean of means": uneven, "a sum": sum(means)})  # fmt: skip
    if got.dtype != torch.float64:
        pytest.fail(f"the mean is {got.dtype}: add up in float64, thousands of prompts lose digits in float32.", pytrace=False)


@exercise("3")
def test_exercise_3_refusal_directions():
    a, b = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    want = a - b
    check(R.refusal_directions(a, b), want, "the difference", **{
        "harmless first": -want, "too early": want / want.norm(dim=-1, keepdim=True), "averaged": want.mean(0)})  # fmt: skip


@exercise("4a")
def test_exercise_4a_project_out():
    x, r = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(1)), torch.eye(16)[3] * 0.6 + torch.eye(16)[9] * 0.8
    before, want = x.clone(), known_projection(x, r)
    got = R.project_out(x, r)
    fail_if(not torch.equal(x, before), "in place")
    check(got, want, "what is left", component=x - want, mirror=2 * want - x)
    half = R.project_out(x.bfloat16(), r)
    if half.dtype != torch.bfloat16:
        pytest.fail(f"what is left of a bfloat16 tensor is {half.dtype}: it must have the dtype of x.", pytrace=False)
    check(half.float(), known_projection(x.bfloat16(), r).float(), "what is left of a bfloat16 tensor (project in float32)")


def hooked_logits(model, tokenizer, modules, change, before=False):
    """Logits with every one of the modules' outputs (or, before=True, inputs) changed by hand."""
    if before:
        handles = [m.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:])) for m in modules]
    else:
        handles = [m.register_forward_hook(lambda m, args, out: change(out)) for m in modules]
    with R.hooked(handles):
        return logits_of(model, tokenizer)


@exercise("4b")
def test_exercise_4b_ablate():
    model, tokenizer = small_model(8.0)
    direction, plain = 3 * R.unit(torch.randn(32, generator=torch.Generator().manual_seed(2))), logits_of(model, tokenizer)
    layers, r = model.model.layers, direction / 3
    writing = [model.model.embed_tokens, *[m for block in layers for m in (block.self_attn.o_proj, block.mlp.down_proj)]]
    project = lambda x: known_projection(x, r)
    with R.ablate(model, direction):
        got = logits_of(model, tokenizer)
    fail_if(not torch.equal(logits_of(model, tokenizer), plain), "left behind")
    check(got, hooked_logits(model, tokenizer, writing, project), "the ablated model's logits", **{
        "no effect": plain, "length": hooked_logits(model, tokenizer, writing, lambda x: known_projection(x, direction)),
        "inputs only": hooked_logits(model, tokenizer, layers, project, before=True)})  # fmt: skip
    try:
        with R.ablate(model, direction):
            raise InterruptedError
    except InterruptedError:
        fail_if(not torch.equal(logits_of(model, tokenizer), plain), "left behind")


@exercise("5")
def test_exercise_5_add():
    model, tokenizer = small_model(8.0)
    vector, plain = 5 * torch.randn(32, generator=torch.Generator().manual_seed(3)), logits_of(model, tokenizer)
    entering = lambda layer, change: hooked_logits(model, tokenizer, [model.model.layers[layer]], change, before=True)
    last = torch.zeros(1, plain.shape[1], 1)
    last[:, -1] = 1
    with R.add(model, vector, 1, coefficient=-0.5):
        got = logits_of(model, tokenizer)
    fail_if(not torch.equal(logits_of(model, tokenizer), plain), "left behind")
    check(got, entering(1, lambda x: x - 0.5 * vector), "the steered model's logits", **{
        "no effect": plain, "unit added": entering(1, lambda x: x - 0.5 * R.unit(vector)),
        "next layer": entering(2, lambda x: x - 0.5 * vector), "last only": entering(1, lambda x: x - 0.5 * vector * last)})  # fmt: skip
    for layer, coefficient, size in ((4, 1.0, 32), (-1, 1.0, 32), (1, math.nan, 32), (1, 1.0, 1)):
        try:
            with R.add(model, vector[:size], layer, coefficient):
                pass
        except R.BadUse:
            continue
        except (IndexError, RuntimeError):
            pass
        pytest.fail(f"layer {layer}, coefficient {coefficient} and a vector of {size} must raise BadUse, and with a sentence (see the docstring).", pytrace=False)


@exercise("6")
def test_exercise_6_log_odds():
    logits, tokens = 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(4)), [1, 5]
    p = logits.double().softmax(-1)
    together = p[:, tokens].sum(-1)
    check(R.log_odds(logits, tokens), (together / (1 - together)).log(), "the score", **{
        "log p": together.log(), "each alone": (p / (1 - p)).log()[:, tokens].sum(-1), "plain p": together})  # fmt: skip
    sure = torch.tensor([[200.0, 0.0, 0.0]])  # 1 - p is 0 in any precision
    check(R.log_odds(sure, [0]), torch.tensor([200 - math.log(2)]), "the score of a model that is very sure (use logsumexp)")


@exercise("7")
def test_exercise_7_kl_divergence():
    p, q = 4 * torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(5))
    q[:, 0] -= 30  # a token that q all but excludes
    P, Q = p.double().softmax(-1), q.double().softmax(-1)
    want = (P * (P.log() - Q.log())).sum(-1)
    check(R.kl_divergence(p, q), want, "the divergence", **{
        "reversed": (Q * (Q.log() - P.log())).sum(-1), "not summed": (P * (P.log() - Q.log())).mean(-1),
        "epsilon": (P * ((P + 1e-6).log() - (Q + 1e-6).log())).sum(-1)})  # fmt: skip


@exercise("8")
def test_exercise_8_choose():
    def table(bypass, kl, induce):
        return {"bypass": torch.tensor(bypass), "kl": torch.tensor(kl), "induce": torch.tensor(induce)}

    nan = math.nan
    cases = [  # five layers, of which the last is too late, or six, of which the last two: (scores, answer, what others say)
        (table([[1.0, -1, 0, 0, -5], [2, -2, -9, -3, -5]], [[0.0] * 5, [0, 0, 7, 0, 0]], [[1.0] * 5, [1, 1, 1, -1, 1]]), (-1, 1),
         {(-1, 2): "broken", (-2, 4): "late", (-1, 3): "weak", (1, 1): "front"}),
        (table([[1.0, -1, 0, 0, 0], [2, nan, -9, -2, 0]], [[0.0] * 5, [0, nan, 7, nan, 0]], [[-1.0] * 5, [-1, nan, 1, nan, 1]]), (-2, 1),
         {None: "strict", (-1, 2): "broken", (-1, 4): "late", (0, 1): "front"}),
        (table([[0.0, -1, 2, 2, -2, -3]], [[0.0] * 6], [[1.0] * 6]), (-1, 1), {(-1, 4): "late", (-1, 5): "late", (0, 1): "front"}),
        (table([[nan, -1.0, -2.0, -3.0, 0.0]], [[0.0] * 5], [[-1.0, -1.0, -1.0, nan, -1.0]]), (-1, 2),
         {(-1, 0): "unmeasured", (-1, 3): "unmeasured", None: "strict", (0, 2): "front"}),
        (table([[-1.0, -2.0, 0, 0, 0]], [[0.0] * 5], [[1.0, R.INDUCE_MIN, 1, 1, 1]]), (-1, 1), {(-1, 0): "edge", (0, 1): "front"}),
        (table([[nan] * 5], [[nan] * 5], [[nan] * 5]), None, {}),
        (table([[-1.0] * 5], [[9.0] * 5], [[1.0] * 5]), None, {}),
    ]  # fmt: skip
    for scores, want, slips in cases:
        got = R.choose(scores)
        if got != want:
            pytest.fail(f"chosen: {got}, and {want} is right. {SLIPS.get(slips.get(got), '')}", pytrace=False)


@exercise("9a")
def test_exercise_9a_erase():
    g = torch.Generator().manual_seed(6)
    r, u, w = R.unit(torch.randn(6, generator=g)), torch.randn(6, generator=g), torch.randn(6, generator=g)
    w = w / (u @ w)
    for shape, axis in (((6, 6), 0), ((6, 4), 0), ((5, 6), 1), ((6,), 0), ((3, 4, 6), 2), ((3, 6, 4), 1)):
        W = torch.randn(shape, generator=g)
        before, want = W.clone(), known_erase(W, axis, r, r)
        got = R.erase(W, axis, r, r)
        fail_if(not torch.equal(W, before), "in place")
        slips = {"component": W - want} | ({"transpose": known_erase(W, 1 - axis, r, r)} if shape == (6, 6) else {})
        check(got, want, f"a weight of shape {shape}, written along axis {axis},", **slips)
        check(R.erase(W, axis, u, w), known_erase(W, axis, u, w), "a weight before a norm (u and w differ)", **{
            "one vector": known_erase(W, axis, u, u), "swapped": known_erase(W, axis, w, u)})  # fmt: skip


@exercise("9b")
def test_exercise_9b_orthogonalize():
    def fresh():
        model, tokenizer = small_model(8.0, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):  # the final norm's gain turns some of the head's r onto other axes
                    p.normal_(generator=torch.Generator().manual_seed(len(name)))
        return model, tokenizer

    def known(**mistake):
        model, tokenizer = fresh()
        names = edit_by_hand(model, r, **mistake)
        return logits_of(model, tokenizer), names

    r = R.unit(torch.randn(32, generator=torch.Generator().manual_seed(7)))
    model, tokenizer = fresh()
    names = R.orthogonalize(model, 3 * r)
    mistakes = {"biases": {"forget": "bias"}, "embeddings": {"forget": "embed"}, "head": {"untie": False}}
    want, writing = known()
    slips = {name: known(**mistake)[0] for name, mistake in mistakes.items()}
    check(logits_of(model, tokenizer), want, "the edited model's logits", **slips)
    if sorted(names or []) != sorted(writing):
        pytest.fail(f"return the names of the edited parameters, and not {names}", pytrace=False)


# Answers that students give: three wrong ones to every exercise, with the words that each must earn, and some right ones
# that are not ours, which must pass.


def answer_ablate(modules_of, hook_of, leave=0):
    @contextmanager
    def ablate(model, direction):
        with R.hooked([attach(hook_of(direction)) for attach in modules_of(model)][leave:]):  # leave: one hook stays in
            yield

    return ablate


def after_writers(model):
    return [lambda hook, m=m: m.register_forward_hook(lambda m, args, out: hook(out)) for m in R.writers(model)]


def before_blocks(model):
    return [lambda hook, m=m: m.register_forward_pre_hook(lambda m, args: (hook(args[0]), *args[1:])) for m in R.blocks(model)]


@contextmanager
def untidy_ablate(model, direction):
    handles = [attach(lambda x: known_projection(x, R.unit(direction))) for attach in after_writers(model)]
    yield
    for handle in handles:  # not reached where the block raises
        handle.remove()


@contextmanager
def careful_ablate(model, direction):
    """Only what enters the blocks, and then the check that refusal.py has."""
    with answer_ablate(before_blocks, lambda d: lambda x: known_projection(x, R.unit(d)))(model, direction):
        R.check_erased(model, R.unit(direction))
        yield


def answer_add(change, late=0):
    @contextmanager
    def add(model, vector, layer, coefficient=1.0):
        attach = before_blocks(model)[layer + late]
        with R.hooked([attach(lambda x: change(x, coefficient * vector))]):
            yield

    return add


def answer_means(finish, layer=0):
    def mean_activations(model, tokenizer, prompts, batch_size=32):
        sums = []
        prompts = sorted(prompts, key=len, reverse=True)
        for start in range(0, len(prompts), batch_size):
            batch = R.forward_arguments(model, R.tokenize(tokenizer, prompts[start : start + batch_size]))
            tails = torch.stack([x[:, -2:].double() for x in stream(model, batch)[layer : layer + 4]], dim=2)
            sums.append(tails)  # (batch, position, layer, d_model)
        return finish(sums)

    return mean_activations


@torch.no_grad()
def means_at_the_end_of_the_row(model, tokenizer, prompts, batch_size=32):
    sums = []

    def step(batch):
        rows, (arguments, _) = [], R.arrange(model, batch, keep=2)
        with R.reading(model, lambda layer, x: rows.append(x[:, -2:].double().sum(0))):  # (batch, seq, d_model) -> (position, d_model)
            model.base_model(**arguments)
        sums.append(torch.stack(rows[:-1], dim=1))
        return [None] * len(batch["input_ids"])

    R.run_batches(step, model, tokenizer, prompts, batch_size)
    return sum(sums) / len(prompts)


def answer_tail(prompts, finish=lambda tail: tail, **options):
    def template_tail(tokenizer):
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": p}], **({"add_generation_prompt": True} | options))["input_ids"] for p in prompts]  # fmt: skip
        return finish(os.path.commonprefix([chat[::-1] for chat in chats])[::-1])

    return template_tail


def some_tail(tail):
    if not tail:
        raise R.CannotDo("no tail")
    return tail


def answer_orthogonalize(**mistake):
    return lambda model, direction: edit_by_hand(model, R.unit(direction), **mistake)


def answer_choose(kl_max=0.1, late=0.8, induce_min=0.0, relax=True, from_end=True, unmeasured=False):
    def choose(scores):
        n, n_layers = scores["bypass"].shape
        for floor in (induce_min, -math.inf)[: 1 + relax]:
            passing = [(scores["bypass"][i, l].item(), i - n * from_end, l) for i in range(n) for l in range(int(late * n_layers))
                       if scores["kl"][i, l] <= kl_max and scores["induce"][i, l] >= floor and (unmeasured or scores["bypass"][i, l] < math.inf)]  # fmt: skip
            if passing:
                return min(passing)[1:]

    return choose


def changed_in_place(x, r):
    x -= (x @ r)[..., None] * r
    return x


softmax = lambda logits: logits.double().softmax(-1)
WRONG = [
    ("1_template_tail", "template_tail", answer_tail(["Say yes", "Why? 1"], add_generation_prompt=False), "generation"),
    ("1_template_tail", "template_tail", answer_tail(["Say yes", "Why? 1"], lambda tail: tail[::-1]), "backwards"),
    ("1_template_tail", "template_tail", answer_tail(["Say yes.", "Why not."]), "instruction"),
    ("2_mean_activations", "mean_activations", answer_means(lambda s: torch.cat(s).mean(0), layer=1), "leaving"),
    ("2_mean_activations", "mean_activations", answer_means(lambda s: torch.cat(s).mean(0).transpose(0, 1)), "layers first"),
    ("2_mean_activations", "mean_activations", answer_means(lambda s: sum(x.mean(0) for x in s) / len(s)), "mean of means"),
    ("2_mean_activations", "mean_activations", answer_means(lambda s: torch.cat(s).sum(0)), "a sum"),
    ("2_mean_activations", "mean_activations", means_at_the_end_of_the_row, "anywhere"),
    ("3_refusal_directions", "refusal_directions", lambda a, b: b - a, "harmless first"),
    ("3_refusal_directions", "refusal_directions", lambda a, b: nn.functional.normalize(a - b, dim=-1), "too early"),
    ("3_refusal_directions", "refusal_directions", lambda a, b: (a - b).mean(0), "averaged"),
    ("4a_project_out", "project_out", lambda x, r: (x @ r)[..., None] * r, "component"),
    ("4a_project_out", "project_out", lambda x, r: x - 2 * (x @ r)[..., None] * r, "mirror"),
    ("4a_project_out", "project_out", changed_in_place, "in place"),
    ("4b_ablate", "ablate", answer_ablate(after_writers, lambda d: lambda x: known_projection(x, d)), "length"),
    ("4b_ablate", "ablate", answer_ablate(before_blocks, lambda d: lambda x: known_projection(x, R.unit(d))), "inputs only"),
    ("4b_ablate", "ablate", answer_ablate(after_writers, lambda d: lambda x: known_projection(x, R.unit(d)), leave=1), "left behind"),
    ("4b_ablate", "ablate", untidy_ablate, "left behind"),
    ("4b_ablate", "ablate", lambda model, direction: nullcontext(), "no effect"),
    ("4b_ablate", "ablate", contextmanager(lambda model, direction: None), "no yield"),
    ("4b_ablate", "ablate", careful_ablate, "not erased"),
    ("5_add", "add", lambda *args, coefficient: nullcontext(), "no effect"),
    ("5_add", "add", answer_add(lambda x, v: x - 0.5 * R.unit(-v)), "unit added"),
    ("5_add", "add", answer_add(lambda x, v: x + v, late=1), "next layer"),
    ("5_add", "add", answer_add(lambda x, v: torch.cat([x[:, :-1], x[:, -1:] + v], dim=1)), "last only"),
    ("6_log_odds", "log_odds", lambda x, t: softmax(x)[:, t].sum(-1).log(), "log p"),
    ("6_log_odds", "log_odds", lambda x, t: torch.logit(softmax(x)[:, t]).sum(-1), "each alone"),
    ("6_log_odds", "log_odds", lambda x, t: softmax(x)[:, t].sum(-1), "plain p"),
    ("7_kl_divergence", "kl_divergence", lambda p, q: (softmax(q) * (softmax(q).log() - softmax(p).log())).sum(-1), "reversed"),
    ("7_kl_divergence", "kl_divergence", lambda p, q: (softmax(p) * (softmax(p).log() - softmax(q).log())).mean(-1), "not summed"),
    ("7_kl_divergence", "kl_divergence", lambda p, q: (softmax(p) * ((softmax(p) + 1e-6).log() - (softmax(q) + 1e-6).log())).sum(-1), "epsilon"),
    ("8_choose", "choose", answer_choose(kl_max=math.inf), "broken"),
    ("8_choose", "choose", answer_choose(late=1), "late"),
    ("8_choose", "choose", answer_choose(relax=False), "strict"),
    ("8_choose", "choose", answer_choose(induce_min=-math.inf), "weak"),
    ("8_choose", "choose", answer_choose(from_end=False), "front"),
    ("8_choose", "choose", answer_choose(unmeasured=True), "unmeasured"),
    ("8_choose", "choose", answer_choose(induce_min=1e-9), "edge"),
    ("9a_erase", "erase", lambda W, axis, u, w: known_erase(W, (W.ndim == 2) - axis if W.shape[0] == W.shape[-1] else axis, u, w), "transpose"),
    ("9a_erase", "erase", lambda W, axis, u, w: known_erase(W, axis, u, u), "one vector"),
    ("9a_erase", "erase", lambda W, axis, u, w: known_erase(W, axis, w, u), "swapped"),
    ("9a_erase", "erase", lambda W, axis, u, w: changed_in_place(W.movedim(axis, -1), u).movedim(-1, axis), "in place"),
    ("9b_orthogonalize", "orthogonalize", lambda model, direction: R.trace_writers(model), "no gradients"),
    ("9b_orthogonalize", "orthogonalize", answer_orthogonalize(forget="bias"), "biases"),
    ("9b_orthogonalize", "orthogonalize", answer_orthogonalize(forget="embed"), "embeddings"),
    ("9b_orthogonalize", "orthogonalize", answer_orthogonalize(untie=False), "head"),
]  # fmt: skip


@pytest.mark.parametrize("name, function, wrong, slip", WRONG, ids=[f"{name}-{slip}" for name, _, _, slip in WRONG])
def test_classroom_names_the_slip(monkeypatch, name, function, wrong, slip):
    monkeypatch.setattr(R, function, wrong)
    with pytest.raises(pytest.fail.Exception) as failure:
        globals()[f"test_exercise_{name}"](monkeypatch)
    assert [name for name, words in SLIPS.items() if words in str(failure.value)] == [slip]


RIGHT = [
    ("1_template_tail", "template_tail", answer_tail(["Say yes", "Why? 1", "Count (to ten)"], some_tail)),
    ("2_mean_activations", "mean_activations", answer_means(lambda s: torch.cat(s).mean(0))),
    ("4b_ablate", "ablate", answer_ablate(after_writers, lambda d: lambda x: known_projection(x, R.unit(d)))),
    ("8_choose", "choose", answer_choose()),
    ("9b_orthogonalize", "orthogonalize", answer_orthogonalize()),
]


@pytest.mark.parametrize("name, function, right", RIGHT, ids=[name for name, _, _ in RIGHT])
def test_classroom_takes_other_right_answers(monkeypatch, name, function, right):
    monkeypatch.setattr(R, function, right)
    globals()[f"test_exercise_{name}"](monkeypatch)


def test_classroom_blanks_differ_in_bodies_only():
    source = (HERE / "refusal.py").read_text(encoding="utf-8")
    blanks, functions = blank(source), EXERCISES.values()
    inserted, there = [line for line in blanks.splitlines() if "is yours to write" in line], iter(source.splitlines())
    assert len(inserted) == len(functions)
    assert all(line in there for line in blanks.splitlines() if line not in inserted), "every other line is there, and in order"
    old, new = ({node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)} for text in (source, blanks))
    head = lambda node: (ast.dump(node.args), ast.get_docstring(node), [ast.dump(d) for d in node.decorator_list])
    for name in old:
        assert head(old[name]) == head(new[name]) and (name in functions) == (ast.dump(old[name]) != ast.dump(new[name])), name
        assert name not in functions or ">>>" in ast.get_docstring(new[name]), name


def test_classroom_every_blank_fails_and_each_can_be_solved_alone(tmp_path, monkeypatch):
    solution = {name: getattr(R, name) for name in EXERCISES.values()}
    write_blank(tmp_path / "student.py")
    student = load(tmp_path / "student.py")
    for number, own in EXERCISES.items():
        test = globals()[f"test_exercise_{number}_{own}"]
        for name in solution:
            monkeypatch.setattr(R, name, getattr(student, name))
        with pytest.raises(pytest.fail.Exception, match=f"exercise {number}: {own} is yours"):
            with monkeypatch.context() as patch:
                test(patch)
        monkeypatch.setattr(R, own, solution[own])
        with monkeypatch.context() as patch:
            test(patch)


def test_classroom_the_students_file_says_what_is_next(saved_tiny, tmp_path, capsys):
    shutil.copytree(R.PROMPTS, tmp_path / "prompts")
    write_blank(tmp_path / "student.py")
    done = subprocess.run([sys.executable, "student.py", "--model", saved_tiny, *map(str, SMALL)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"next: exercise 1: template_tail is yours .* pytest -k exercise_1\n", done.stderr)
    capsys.readouterr()
    before = (tmp_path / "student.py").read_bytes()
    assert write_blank(tmp_path / "student.py") == 2 and (tmp_path / "student.py").read_bytes() == before
    assert re.fullmatch("error: .*name a new file.\n", capsys.readouterr().err)


def test_classroom_grades_a_file_elsewhere(tmp_path):
    write_blank(tmp_path / "student.py")
    grade = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", HERE / "test_refusal.py"]
    grade += ["-k", "not elsewhere", "--maxfail=12"]  # should more than exercises be left, it must not come back to this test
    done = subprocess.run(grade, cwd=tmp_path, env=os.environ | {"REFUSAL": "student.py"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and f"{len(EXERCISES)} failed in" in done.stdout, done.stdout
    failed = re.findall(r"FAILED .*test_exercise_(\w+?)_", done.stdout)
    assert failed == list(EXERCISES) and "Traceback" not in done.stdout and done.stdout.count("is yours to write") >= len(EXERCISES)


# %% Every architecture: the census -------------------------------------------------------------------------
#
# refusal.py keeps no table of architectures, so its claim is about all of them.  Here it is held to that: a tiny random
# model of every decoder in transformers, and for each one the proofs that ablating, adding and orthogonalizing do what
# they say.  `pytest` runs a dozen, `pytest -m census` all, `python test_refusal.py census` prints the table.


# The verdicts.  "exact": the edited weights and the hooks are one function.  "near": a norm writes to the stream, so the
# weights come r-free but only close (see through_norm).  "refused": CannotDo, from ablate or only from orthogonalize.
# Whatever is not listed must be exact; wrong without an error is never a verdict.
NEAR = set(
    "afmoe axk1 beam bloom exaone4 flex_olmo gemma2 gemma2-untied gemma3_text gemma4_text gemma4_text-moe "
    "gemma4_unified_text glm4 hyperclovax kolibri1 lfm3 modernbert-decoder nanochat olmo2 olmo3 olmo_hybrid".split()
)
REFUSED = {
    name: reason
    for reason, names in {
        "the positions are fixed waves that no module learns": "ctrl xglm",
        "the stream is scaled or normed itself, not only added to": "bloom-residual-after-norm doge minimax openai-gpt opt-norm-after "
        "opt-projected rwkv zaya",
        "several streams, mixed between the blocks": "deepseek_v4 gemma3n_text hy_v4 inkling2_text qwen4_exp_text reformer",
        "two stacks of blocks, run in a loop": "hrm_text",
        "a bias is added by the block itself": "gpt_neox_japanese",
        "weights only: a writer that mixes the channels it is given": "inkling_text longcat_flash",
    }.items()
    for name in names.split()
}
DOZEN = "llama qwen2-tied gpt2 gptj gemma2 mixtral gpt_oss bloom opt olmo2 falcon cohere phi qwen3_next zaya".split()

# One table of sizes serves all families: whatever name a configuration has for a thing gets that thing's tiny value.
VOCAB, D = 120, 48
SIZES = {
    name: value
    for names, value in {
        "vocab_size vocab_size_per_layer_input": VOCAB,
        "hidden_size n_embd d_model embedding_dim word_embed_proj_dim lru_width": D,
        "intermediate_size n_inner ffn_dim ffn_hidden_size dff intermediate_size_mlp": 80,
        "prefix_dense_intermediate_size dense_intermediate_size feed_forward_size": 80,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size": 40,
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size": 40,
        "num_hidden_layers n_layer n_layers num_layers num_blocks": 3,
        "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads": 4,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads": 2,
        "head_dim kv_channels swa_head_dim": 16,  # 4 heads of 16: not the hidden size
        "max_position_embeddings n_positions n_ctx max_seq_len context_length": 128,
        "sliding_window sliding_window_size attention_window_size local_attention attention_chunk_size window_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # mixtures of experts
        "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
        "num_experts_per_tok moe_topk moe_k top_k_experts n_group": 2,
        "num_shared_experts n_shared_experts moe_num_shared_experts topk_group": 1,
        "first_k_dense_replace num_dense_layers": 1,
        # latent attention and its indexer
        "q_lora_rank o_lora_rank": 20,
        "kv_lora_rank index_topk": 24,
        "qk_rope_head_dim rotary_dim": 8,
        "qk_nope_head_dim index_head_dim indexer_head_dim index_block_size": 16,
        "v_head_dim linear_value_head_dim": 12,
        "index_n_heads index_topk_blocks": 2,
        # side inputs, state spaces and linear attention
        "hidden_size_per_layer_input laurel_rank hc_lowrank gated_norm_rank": 8,
        "mamba_d_state state_size ssm_state_size": 8,
        "mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads linear_num_value_heads": 4,
        "linear_num_key_heads mamba_n_groups n_groups mamba_ngroups": 2,
        "mamba_d_head mamba_head_dim": 24,
        "linear_head_dim linear_key_head_dim mamba_chunk_size chunk_size": 16,
        "mamba_dt_rank time_step_rank": 3,
        # scales, away from the 1 at which forgetting them goes unnoticed
        "query_pre_attn_scalar": 12,
        "embedding_multiplier embedding_scale": 3.0,
        "residual_multiplier logit_scale lm_head_multiplier key_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling logits_mup_width_multiplier": 1.5,
        "attention_in_multiplier attention_out_multiplier ssm_in_multiplier ssm_out_multiplier": 0.8,
    }.items()
    for name in names.split()
}
SWA, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILY = {  # what a family needs beyond that
    "bamba": dict(attn_layer_indices=[1]),
    "cohere_compass_text": dict(
        layer_types=[SWA, FULL, SWA], rope_parameters=dict.fromkeys([SWA, FULL], ROPE | {"mrope_section": [4, 2, 2]})
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
        ffn_config=dict(hidden_size=D, ffn_hidden_size=80, moe_num_experts=4, moe_top_k=2),
    ),
    "dots1": dict(layer_types=[SWA, FULL, SWA]),
    "dots3_note_text": dict(
        head_dim=24, swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=20, swa_kv_lora_rank=24
    )
    | dict(swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=12),
    "falcon_h1": dict(mamba_d_ssm=96, mlp_multipliers=[0.8, 1.3], ssm_multipliers=[0.8, 1.2, 0.9, 1.1, 0.7]),
    "gemma3n_text": dict(num_hidden_layers=4, num_kv_shared_layers=2),
    "gemma4_text": dict(layer_types=[SWA, FULL, FULL]),
    "gemma4_unified_text": dict(layer_types=[SWA, FULL, FULL]),
    "glm4_moe": dict(head_dim=16),
    "gpt_neo": dict(attention_types=[[["global", "local", "global"], 1]]),
    "gpt_oss": dict(intermediate_size=D),  # square experts, as released
    "granitemoehybrid": dict(layer_types=[LINEAR, FULL, LINEAR]),
    "helium": dict(head_dim=12),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(layer_types=[FULL, SWA, FULL], num_attention_heads_per_layer=[4, 6, 4]),
    "lfm2": dict(layer_types=["conv", FULL, "conv"], block_multiple_of=8),
    "lfm2_moe": dict(layer_types=["conv", FULL, "conv"]),
    "longcat_flash": dict(zero_expert_num=2, head_dim=8),
    "mamba2": dict(head_dim=24),
    "mellum": dict(layer_types=[FULL, SWA, FULL], mlp_layer_types=["dense", "sparse", "sparse"]),
    "minimax_m3_vl_text": dict(layer_types=[FULL, "minimax_m3_sparse", FULL], mlp_layer_types=["dense", "sparse", "sparse"]),
    "minicpm3": dict(scale_emb=3, dim_model_base=32),
    "ministral": dict(layer_types=[SWA, FULL, SWA]),
    "nemotron_h": dict(layers_block_type=[LINEAR, "moe", FULL, "mlp"]),
    "qwen3_moe": dict(head_dim=16),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_budget=64, indexer_compress_ratio=4),
    "reformer": dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local", "lsh", "local"], hash_seed=0),
    "stablelm": dict(rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
    "xlstm": dict(hidden_size=128, embedding_dim=128),
    "youtu": dict(pad_token_id=None),  # its loader would set the row of a padding token to zero
    "zamba": dict(layers_block_type=["hybrid", LINEAR, "hybrid"]),
    "zamba2": dict(layers_block_type=["hybrid", LINEAR, "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
VARIANTS = {
    "bloom-residual-after-norm": dict(apply_residual_connection_post_layernorm=True),
    "cohere-qk-norm": dict(use_qk_norm=True),
    "deepseek_v3-no-q-lora": dict(q_lora_rank=None),
    "falcon-alibi-sequential": dict(alibi=True, parallel_attn=False, bias=True),
    "falcon-multi-head": dict(multi_query=False, num_kv_heads=4),
    "falcon-new": dict(new_decoder_architecture=True),
    "falcon-new-one-norm": dict(new_decoder_architecture=True, num_ln_in_parallel_attn=1),
    "gemma4_text-moe": dict(enable_moe_block=True, num_experts=4, top_k_experts=2),
    "gpt_neox-sequential": dict(use_parallel_residual=False),
    "llama-biased": dict(attention_bias=True, mlp_bias=True),
    "mpt-biased": dict(no_bias=False),
    "olmo-clipped": dict(clip_qkv=0.5),
    "opt-norm-after": dict(do_layer_norm_before=False),
    "opt-projected": dict(do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-projected-before": dict(word_embed_proj_dim=32),
    "phi-qk-norm": dict(qk_layernorm=True),
    "qwen2-sliding": dict(layer_types=[FULL, SWA, FULL], use_sliding_window=True),
    "qwen2_moe-mixed": dict(mlp_only_layers=[0]),
    "qwen3_moe-mixed": dict(mlp_only_layers=[0]),
    "stablelm-parallel": dict(use_parallel_residual=True),
    "stablelm-qk-norm": dict(qk_layernorm=True, use_qkv_bias=True),
    **{f"{name}-tied": TIED for name in "gpt_neox gptj granite llama phi qwen2 qwen3".split()},
    **{f"{name}-untied": UNTIED for name in "cohere gemma gemma2 gpt2 opt smollm3 starcoder2".split()},
}
SKIP = set(  # encoders; seers of the tokens to their right; halves; audio, images or bytes; wrappers of a *_text; assistants
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert "
    "roformer xlm xlm-roberta xlm-roberta-xl xmod cpmant xlnet bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp "
    "pegasus plbart prophetnet trocr whisper moss_transcribe_diarize musicgen musicgen_melody fuyu git got_ocr2 dots3_note gemma3 gemma3n "
    "gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp phi4_multimodal blt gemma4_assistant gemma4_unified_assistant".split()
)
NAMES = [name for name in CAUSAL_LMS if name not in SKIP] + list(VARIANTS)


def tiny_of(name):
    """A tiny random float32 model of this family or variant, the same at every call; KeyError if transformers has no such family."""
    family = name if name in CAUSAL_LMS else name.partition("-")[0]
    cls = transformers.CONFIG_MAPPING[family]
    cls = cls.sub_configs.get("text_config", cls)
    default, given = cls(), FAMILY.get(family, {}) | VARIANTS.get(name, {})
    sizes = {key: value for key, value in SIZES.items() if key in cls.__dataclass_fields__}
    if "kv_lora_rank" in sizes:  # latent attention has a key and a value for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for key, value in vars(default).items():  # a list with an entry a layer goes through all its kinds of layer
        if (
            isinstance(value, (list, tuple))
            and len(value) == default.num_hidden_layers
            and key in cls.__dataclass_fields__.keys() - SIZES
        ):
            kinds = list(dict.fromkeys(value))
            sizes[key] = [kinds[i % len(kinds)] for i in range(given.get("num_hidden_layers", 3))]
    torch.manual_seed(0)
    model = getattr(transformers, CAUSAL_LMS[family])(cls(**sizes | given))
    with torch.no_grad():
        randomise(model)
    return model.float().eval().requires_grad_(False)


def randomise(model):
    """No parameter is left at zero or one, and every layer adds about as much to the stream as is there."""
    for path, p in model.named_parameters():  # a tied parameter comes once, as the embedding
        module, noise = model.get_submodule(path.rpartition(".")[0]), torch.randn_like(p)
        if re.search(r"A_log|\.D$|dt_|time_", path):  # parameters of state spaces, which take little change
            p.add_(0.1 * noise)
        elif "bias" in path.rpartition(".")[2]:
            p.copy_(0.1 * noise)
        elif p.ndim < 2 or "norm" in type(module).__name__.lower():
            p.add_(0.3 * noise)
        else:
            p.copy_((0.4 if isinstance(module, torch.nn.Embedding) else 0.15) * noise)
    for path, buffer in model.state_dict().items():
        if re.search(r"(correction|expert)_bias$|balancing_biases$|layer_scalar$", path):  # learned, yet kept as buffers
            buffer.add_(0.1 * torch.randn_like(buffer))


class Sums(TorchDispatchMode):
    """Follows the residual stream through a forward pass and finds the most of r in it, at any sum: `left`, max |x.r|/|x|.

    It knows no modules and no writers, only memory: what enters block 0 is the stream; so is every view, cast or scaled copy
    of it, and everything that is added to it.  What enters a later block must have been reached in this way.
    """

    SAME = {"_to_copy", "clone", "copy_", "add", "add_", "mul", "mul_", "div", "div_"}

    def __init__(self, model, r):
        super().__init__()
        self.model, self.r, self.left, self.sums, self.memory = model, r, 0.0, 0, {}

    def follow(self, x):
        self.memory[x.untyped_storage().data_ptr()] = x  # kept, so that the address is not used again
        self.left = max(self.left, ((x.float() @ self.r).abs() / x.float().norm(dim=-1)).max().item())

    def follows(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in self.SAME and any(map(self.follows, args)) and out.shape[-1:] == self.r.shape:
            scaled = name[:3] in ("mul", "div")
            if not scaled or any(not isinstance(x, torch.Tensor) or x.numel() == 1 for x in args):
                self.follow(out)
                self.sums += name.startswith("add")
        return out

    def see(self, layer, x):
        assert layer == 0 or self.follows(x), f"what enters block {layer} is not a sum that holds the stream"
        self.follow(x)

    def run(self, *inputs):
        with R.reading(self.model, self.see):
            for ids in inputs:
                with self:
                    self.model(ids)
        assert self.sums >= len(inputs) * len(R.blocks(self.model)), "some block added nothing"
        return self.left


def apart(a, b):
    """How far apart two lists of logits are: the greatest difference, relative to the greatest logit (where that is above 1)."""
    return max((x - y).abs().max().item() / max(1, y.abs().max().item()) for x, y in zip(a, b))


def gap(a, b):
    """The typical relative distance of logits: the median over tokens (one token that goes to another expert says little)."""
    return torch.cat([((x - y).norm(dim=-1) / y.norm(dim=-1)).flatten() for x, y in zip(a, b)]).median().item()


def project_plainly(before, after, r):
    """The baseline for models whose norms write: W - r r^T W, with r alone, along the axis that was edited."""
    for axis in range(before.ndim):
        if before.shape[axis] == len(r):
            rows = (after - before).movedim(axis, -1).reshape(-1, len(r))  # all multiples of one vector, if this is the axis
            one = R.unit(rows[rows.norm(dim=1).argmax()])
            if (rows - (rows @ one)[:, None] * one).norm() < 1e-2 * rows.norm():
                return R.project_out(before.movedim(axis, -1), r).movedim(-1, axis)
    raise AssertionError("the change to a weight is not of the form w (u^T W)")


def verdict(verdict, gap=math.nan, plain=math.nan, note=""):
    return SimpleNamespace(verdict=verdict, gap=gap, plain=plain, note=str(note))


@torch.no_grad()
def prove(model, seed=0):
    """Every claim of sections 5 and 8, for one model: AssertionError, or its verdict, logit gap (and the baseline's) and a note."""
    generator = torch.Generator().manual_seed(seed)
    r = R.unit(torch.randn(model.config.get_text_config(decoder=True).hidden_size, generator=generator))
    inputs = [torch.randint(3, 100, shape, generator=generator) for shape in ((2, 9), (1, 72))]  # 72: past a sliding window of 64
    logits = lambda: [model(ids).logits for ids in inputs]
    greedy = lambda cache: model.generate(
        inputs[1], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache
    ).tolist()
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))
    base, notes = logits(), []

    # ablate: nothing of r in any sum, and nothing stays behind
    try:
        with R.ablate(model, 3 * r):
            assert Sums(model, r).run(*inputs) < 1e-4, "ablate leaves r in the stream"
            ablated = logits()
            if greedy(True) != greedy(False):
                notes.append("cached and uncached replies differ when ablated")
            raise InterruptedError
    except InterruptedError:
        pass
    except R.CannotDo as refusal:
        assert same(logits(), base), "a refused ablation leaves something behind"
        return verdict("refused", note=refusal)
    assert same(logits(), base), "ablate leaves something behind"
    assert apart(ablated, base) > 1e-3, "ablate does nothing"
    if notes:
        assert greedy(True) != greedy(False), notes[0]
        notes = ["cached and uncached replies differ without hooks, too"]

    # packed prompts: the same logits, or not packed
    opening, full = torch.randint(3, 100, (40,), generator=generator).tolist(), torch.zeros(3, 72, dtype=torch.long)
    for row, n in zip(full, (5, 9, 32)):  # 72 tokens: past a sliding window of 64
        row[-40 - n :] = torch.tensor(opening + torch.randint(3, 100, (n,), generator=generator).tolist())
    batch = R.forward_arguments(model, {"input_ids": full, "attention_mask": (full > 0).long()})
    packed, plain = (R.first_logits(model, *way(model, batch)) for way in (R.arrange, R.padded))
    assert apart([packed], [plain]) < 1e-4, "packing changes the logits"

    # add: exactly coefficient * vector, at its layer
    def streams():
        seen = {}
        with R.reading(model, seen.__setitem__):
            model(inputs[0])
        return seen

    before, n_layers = streams(), len(R.blocks(model))
    for layer in {0, n_layers - 1}:
        with R.add(model, 5 * r, layer, -0.3):
            after = streams()
        assert torch.equal(after[layer], before[layer] + -0.3 * (5 * r)), "add moves the stream by something else"
        assert all(torch.equal(after[i], before[i]) for i in range(layer)), "add moves the stream before its layer"
        assert not torch.equal(after[n_layers], before[n_layers]), "add does nothing"
    assert same(logits(), base), "add leaves something behind"

    # orthogonalize: the same function without hooks, only the listed weights edited, tied heads untied, on disk as in memory
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        edited = R.orthogonalize(model, 3 * r)
    except R.CannotDo as refusal:
        return verdict("refused", note=f"weights only: {refusal}")
    assert Sums(model, r).run(*inputs) < 1e-4, "orthogonalize leaves r in the stream"
    new = model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert new.keys() == old.keys() and set(edited) == changed, f"listed {edited}, changed {changed}"
    orthogonal = logits()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        assert apart([again(ids).logits for ids in inputs], orthogonal) < 1e-5, "the saved model is another one"
        assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight, "the saved head is tied again"
    if apart(orthogonal, ablated) < 1e-4:
        return verdict("exact", apart(orthogonal, ablated), note="; ".join(notes))

    # a norm writes: near, and much nearer than projecting with r alone (which is the same where the norm has no gain)
    for name in edited:
        new[name].copy_(project_plainly(old[name], new[name], r))
    ours, plain = gap(orthogonal, ablated), gap(logits(), ablated)
    assert ours < 0.05 and (ours < plain / 3 or math.isclose(ours, plain, rel_tol=1e-3)), (
        f"orthogonalize is {ours:.3f} from ablate; r alone would be {plain:.3f}"
    )
    return verdict("near", ours, plain, "; ".join(notes))


def expected(name):
    return "near" if name in NEAR else "refused" if name in REFUSED else "exact"


def pytest_generate_tests(metafunc):
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", NAMES if "census" in metafunc.config.option.markexpr else DOZEN)


@census_mark
def test_architecture(architecture):
    try:
        model = tiny_of(architecture)
    except KeyError:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    result = prove(model)
    assert result.verdict == expected(architecture), result
    if result.verdict == "refused":  # in one sentence that says where
        assert re.search("block|embeddings|writes to the stream", result.note) and "\n" not in result.note, result.note


def test_a_chat_model_inside_a_vision_model():
    """Gemma 3 as it is released: the decoder is one part of a wrapper, whose other blocks come first and are as many."""
    vision = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(
        text_config=tiny_of("gemma3_text").config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        randomise(model)
    assert prove(model).verdict == "near"


@pytest.mark.parametrize("name", "llama gpt2 mixtral gemma2 qwen2-tied".split())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_pass_their_own_check(name, dtype):
    """r goes as far as the rounding allows, and both check_erased calls agree."""
    model, r = tiny_of(name).to(dtype), torch.randn(D, generator=torch.Generator().manual_seed(0))
    with R.ablate(model, r):
        pass
    R.orthogonalize(model, r)


def census(names=None):
    """Print family | verdict | logit gap | note for every family (or those named); the exit status."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started, count, wrong = time.time(), {}, 0
    print(f"{'family':<28}{'verdict':<10}{'gap':<9}{'r alone':<9}note")
    for name in names or NAMES:
        try:
            result = prove(tiny_of(name))
        except Exception as error:
            result = verdict("WRONG", note=f"{type(error).__name__}: {error}")
        odd = result.verdict != expected(name)
        wrong += odd
        count[result.verdict] = count.get(result.verdict, 0) + 1
        numbers = "".join(
            f"{x:<9.1e}" if x < 1e-3 else f"{x:<9.3f}" if x == x else f"{'-':<9}" for x in (result.gap, result.plain)
        )
        print(f"{name:<28}{result.verdict:<10}{numbers}{f'EXPECTED {expected(name)}! ' * odd}{result.note}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in count.items()), f"in {time.time() - started:.0f} s")
    return int(wrong > 0)


# %% python test_refusal.py bench [--model FOLDER]: what it costs ---------------------------------------


def timed(model, work):
    """Run work(): seconds, prompts and tokens (padding and probes too) that entered the first block, and the result."""
    count = torch.zeros(2, dtype=torch.long)

    def see(module, args):
        count.add_(torch.tensor([args[0].shape[0], args[0].shape[0] * args[0].shape[1]]))

    handle, start = R.blocks(model)[0].register_forward_pre_hook(see), time.perf_counter()
    try:
        result = work()
    finally:
        handle.remove()
    return time.perf_counter() - start, *count.tolist(), result


def ratio(slow, fast, around=nullcontext, times=5):
    """Median seconds of each, run by turns, and the median ratio (drifts of the machine cancel).  slow() runs inside around()."""
    pairs = []
    for _ in range(times + 1):
        with around():
            start = time.perf_counter()
            slow()
            middle = time.perf_counter()
        again = time.perf_counter()
        fast()
        pairs.append((middle - start, time.perf_counter() - again))
    pairs = pairs[1:]  # the first round warms up
    return (
        statistics.median(s for s, _ in pairs),
        statistics.median(f for _, f in pairs),
        statistics.median(s / f for s, f in pairs),
    )


@contextmanager
def peak_memory():
    """A thread that reads this process's resident memory every 10 ms (Linux); yields [MiB above the start at the worst]."""
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    start, most, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            most[0] = max(most[0], resident() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def bench_prompts(model, tokenizer):
    """REFUSAL_REFERENCE/prompts.json, or of the project's own 40 + 8 of each kind whose score has the right sign."""
    if os.environ.get("REFUSAL_REFERENCE"):
        return json.loads((Path(os.environ["REFUSAL_REFERENCE"]) / "prompts.json").read_text())
    chosen = {}
    for kind, sign in (("harmful", 1), ("harmless", -1)):
        prompts = R.split(R.load_prompts(R.PROMPTS / f"{kind}.txt"), 128, 32, 100)
        for part, few, enough in (("train", prompts[0], 40), ("val", prompts[1], 8)):
            scores = R.refusal_scores(model, tokenizer, few)
            chosen[f"{kind}_{part}"] = [p for p, score in zip(few, scores) if sign * score > 0][:enough]
    return chosen


def bench(folder="tiny", sample=3):
    """Print the cost of refusal.py's search beside that of the plain procedure, on the same prompts in the same run."""
    model, tokenizer = R.load_model(folder)
    data = bench_prompts(model, tokenizer)
    train, val = [[data[f"{kind}_{part}"] for kind in ("harmful", "harmless")] for part in ("train", "val")]
    print(
        f"{folder}: {torch.get_num_threads()} threads, {model.dtype}, train {len(train[0])} + {len(train[1])}, validation {len(val[0])} + {len(val[1])} prompts"
    )

    def ours():
        with peak_memory() as most:
            means = timed(model, lambda: [R.mean_activations(model, tokenizer, prompts) for prompts in train])
            directions = R.refusal_directions(*means[3])
            search = timed(model, lambda: R.select_direction(model, tokenizer, directions, *val))
        return means, search, directions, most[0]

    R.writers(model)  # found once a model
    means, search, directions, most = ours()
    everything = [(p, layer) for p in range(-len(directions), 0) for layer in range(directions.shape[1])]
    whole, best = len(everything), (search[3].position, search[3].layer)
    if folder != "tiny":  # the winner, and a sample spread over positions and layers
        everything = [best, *everything[whole // (2 * sample) :: whole // sample][:sample]]
    plain_m = timed(model, lambda: [plain_means(model, tokenizer, prompts, 32) for prompts in train])
    base = timed(model, lambda: plain_logits(model, tokenizer, val[1]))
    plain_s = timed(model, lambda: plain_select(model, tokenizer, directions, *val, only=everything))
    times = whole / len(everything)  # the sweeps grow with the candidates, the baseline does not
    plain_all = [a + b + (s - b) * times for a, b, s in zip(plain_m[:3], base[:3], plain_s[:3])]
    ours_all = [a + b for a, b in zip(means[:3], search[:3])]
    measured = int(search[3].scores["bypass"].isfinite().sum())
    print(
        f"plain: means measured; sweeps measured on {len(everything)} of {whole} candidates"
        + (", extrapolated to all" if times > 1 else "")
    )
    print(f"{'':<24}{'seconds':>10}{'rows':>18}{'tokens':>10}   (a packed row holds many prompts; attribution's backward pass is in the seconds only)")
    for name, row in (
        ("plain means", plain_m),
        ("plain, all", plain_all),
        ("mean_activations", means),
        ("select_direction", search),
        ("refusal.py, all", ours_all),
    ):
        print(f"{name:<24}{row[0]:>10.1f}{row[1]:>18.0f}{row[2]:>10.0f}")
    print(f"{'plain / refusal.py':<24}" + "".join(f"{a / b:>{w - 1}.1f}x" for a, b, w in zip(plain_all, ours_all, (10, 18, 10))))
    print(
        f"search: {measured} candidates measured; winner position {search[3].position}, layer {search[3].layer}, induce filter relaxed: {search[3].relaxed}"
    )
    for at in everything:  # the sample was measured by both only if it reached a full evaluation
        for name, plain in zip(("bypass", "kl", "induce"), plain_s[3]):
            if search[3].scores[name][at].isfinite():
                print(f"  {at} {name}: {search[3].scores[name][at]:.4f} and plain {plain[at]:.4f}")
    print(f"peak memory above the loaded model: {most:.0f} MiB (a thread reading the resident size every 10 ms)")

    batch = R.forward_arguments(model, R.tokenize(tokenizer, val[0]))
    bare = torch.no_grad()(lambda: model.base_model(**batch, use_cache=False))
    line = "{:<44}{:.3f} s, bare base_model forward {:.3f} s: {:.2f}x (medians of 5 turns)"
    print(line.format("mean_activations, with tokenizing", *ratio(lambda: R.mean_activations(model, tokenizer, val[0]), bare)))
    around = lambda: R.ablate(model, search[3].vector)
    print(line.format("ablated forward", *ratio(bare, bare, around)))

    def enter():
        with around():
            bare()

    print(line.format("ablated forward, with ablate()'s probe", *ratio(enter, bare)))
    arrange, score = R.arrange, lambda: R.refusal_scores(model, tokenizer, val[0])

    @contextmanager
    def padded():
        R.arrange = R.padded
        yield
        R.arrange = arrange

    print("refusal scores of padded prompts {:.3f} s, of packed ones {:.3f} s: {:.2f}x".format(*ratio(score, score, padded)))
    bench_growth(train)


def bench_growth(train):
    """How the cost grows when the prompts or the layers double: random Llamas, early stop after 2 candidates."""
    tokenizer = R.tiny_tokenizer([*train[0], *train[1]])
    for n_layers, n_prompts in ((4, 8), (4, 16), (8, 8)):
        config = R.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=n_layers, num_attention_heads=4
        )
        torch.manual_seed(0)
        model = R.LlamaForCausalLM(config).eval().requires_grad_(False)
        few = [prompts[:n_prompts] for prompts in train]
        R.writers(model)
        means = timed(model, lambda: [R.mean_activations(model, tokenizer, prompts) for prompts in few])
        search = timed(model, lambda: R.select_direction(model, tokenizer, means[3][0] - means[3][1], *few, patience=2))
        print(
            f"{n_layers} layers, {n_prompts:>2} prompts: means {means[0]:.3f} s, {means[1]} rows; search {search[0]:.2f} s, {search[1]} rows"
        )


if "REFUSAL" in os.environ:  # grading a student: nothing but the exercises
    for name in [name for name in globals() if name.startswith("test_") and not name.startswith("test_exercise_")]:
        del globals()[name]

if __name__ == "__main__":
    tool, *rest = [*sys.argv[1:], ""]
    if tool == "census":
        sys.exit(census())
    if tool == "bench":
        sys.exit(bench(rest[1] if rest[0] == "--model" else "tiny"))
    if tool == "blank" and rest[0]:
        sys.exit(write_blank(rest[0]))
    sys.exit("usage: python test_refusal.py blank FILE | census | bench [--model FOLDER]")
