"""Proofs for refusal.py: known answers, identities of the paper, independent oracles.

    pytest                                          # two minutes on two cores, nothing to download
    pytest -m census                                # every architecture that transformers has
    pytest -m seeds                                 # the tiny model's bars on five seeds
    REFUSAL_MODEL=folder pytest -m real             # the paper's claims on a real model

    python test_refusal.py census                   # the census as a table
    python test_refusal.py bench [--model FOLDER]   # the search against the plain procedure
"""

import collections
import copy
import doctest
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
R = importlib.import_module(os.environ.get("REFUSAL", "refusal").removesuffix(".py"))  # a student's file is graded like ours

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
    args = SimpleNamespace(max_new_tokens=24, batch_size=32)
    chosen.coefficient = R.find_dose(*tiny, chosen, data["harmless"].val, args)
    return chosen


@pytest.fixture
def toy():
    """A small random model and a tokenizer to go with it, new for every test: (model, tokenizer)."""
    tokenizer = R.tiny_tokenizer(["How do I boil an egg?", "Write a poem about rain and bad weather", "Explain how to swim"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                                      num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.mul_(8.0 if p.ndim > 1 else 1.0)  # the default initialisation is so small that every block does next to nothing
    return model, tokenizer


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
        assert bad.split()[0] == good.split()[0] and bad[-1:] == "?" if good[-1:] == "?" else bad[-1:] != "?", (bad, good)
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
        config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.2)
        model = transformers.GPT2LMHeadModel(config).eval()
    together = R.refusal_scores(model, tokenizer, PROMPTS)
    alone = torch.cat([R.refusal_scores(model, tokenizer, [p]) for p in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    means = R.mean_activations(model, tokenizer, PROMPTS)
    alone = sum(R.mean_activations(model, tokenizer, [p]) for p in PROMPTS) / len(PROMPTS)
    torch.testing.assert_close(means, alone, atol=1e-5, rtol=1e-5)


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
        model.model.layers[2].register_forward_pre_hook(lambda m, args: (args[0] + 40 * marked[-1][:, None, None] * planted, *args[1:])),
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


@pytest.mark.parametrize("dtype, shape", [(torch.float32, (3, 7, 64)), (torch.bfloat16, (2, 5, 300)), (torch.float16, (1, 1, 33)), (torch.float32, (129,))])
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
    for bad, message in ((torch.zeros(32), "no direction"), (torch.full((32,), math.nan), "no direction"), (torch.ones(31), "needs")):
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
    assert R.log_odds(sure, [0]).item() == pytest.approx(200 - math.log(2)) and R.log_odds(sure, [1]).item() == pytest.approx(-200, abs=1e-3)


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
    assert plain[0] == tokenizer.decode(ids[0, R.tokenize(tokenizer, [PROMPTS[0]])["input_ids"].shape[1] :], skip_special_tokens=True)
    model.generation_config = own = transformers.GenerationConfig(do_sample=True, temperature=2.0, repetition_penalty=3.0, suppress_tokens=[5, 6, 7, 8])
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
    along = [R.projections(*tiny, data[kind].test, found.vector, found.position)[:, found.layer] for kind in ("harmful", "harmless")]
    assert R.auroc(*along) > 0.95


@seeds
@pytest.mark.parametrize("seed", range(1, 5))
def test_the_paper_holds_on_other_seeds(seed, data, request):
    if "seeds" not in request.config.getoption("-m"):
        pytest.skip("pytest -m seeds")
    model, tokenizer = R.train_tiny_model(seed)
    means = [R.mean_activations(model, tokenizer, data[kind].train) for kind in ("harmful", "harmless")]
    chosen = R.select_direction(model, tokenizer, R.refusal_directions(*means), data["harmful"].val, data["harmless"].val)
    chosen.coefficient = R.find_dose(model, tokenizer, chosen, data["harmless"].val, SimpleNamespace(max_new_tokens=24, batch_size=32))
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


SMALL = ("--n-train", 32, "--n-val", 16, "--n-test", 20, "--max-new-tokens", 16)


def test_the_program_from_end_to_end(saved_tiny, tmp_path):
    done = program("--model", saved_tiny, *SMALL, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for stage in ("1 model", "2 prompts", "3 directions", "4 selection", "  detector", "5 refusals", "  weights", "  cost", "6 replies"):
        assert f"\n{stage}" in "\n" + done.stdout
    assert not re.search(r"[\x1b\r]", done.stdout + done.stderr), "a pipe gets clean text"
    row = lambda name: [int(x) for x in re.search(rf"{name}.*", done.stdout)[0].replace("/20", " ").split() if x.isdigit()]
    assert row("no intervention")[0] >= 17 and row("direction ablated")[0] <= 2
    edited = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "results.json").read_text())
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "direction.safetensors", "pt") as file:
        r = file.get_tensor("direction")
        assert file.metadata()["layer"] == str(numbers["layer"])
    assert (R.unit(r) @ edited.model.layers[0].mlp.down_proj.weight).abs().max() < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["out"], "nothing half-written is left"
    again = program("--model", saved_tiny, *SMALL, "--save", tmp_path / "out")
    assert again.returncode == 2 and "not an empty folder" in again.stderr


def test_the_same_command_prints_the_same_numbers(saved_tiny):
    runs = [program("--model", saved_tiny, *SMALL, "--layer", 2, "--coefficient", 1).stdout for _ in range(2)]
    without_time = [re.sub(r"(?m)^time.*", "", run) for run in runs]
    assert without_time[0] == without_time[1] and "skipped: position -1, layer 2" in runs[0]


@pytest.mark.parametrize("arguments, status, message", [
    (("--model", "qwen-1.8"), 2, "did you mean qwen-1.8b?"),
    (("--model", "{empty}"), 1, "cannot be loaded"),
    (("--model", "{tiny}", "--harmful", "{empty}/none.txt"), 2, "No such file"),
    (("--model", "{tiny}", "--n-train", 5000), 2, "prompts of each kind are needed"),
    (("--model", "{tiny}", "--n-train", 0), 2, "at least 2"),
    (("--model", "{tiny}", "--layer", 99), 2, "--layer from 0 to 5"),
    (("--model", "{tiny}", "--position", -1), 2, "needs --layer"),
    (("--model", "{tiny}", "--coefficient", "nan"), 2, "finite"),
    (("--model", "{tiny}", "--harmful", "{harmless}"), 2, "in both files"),
])  # fmt: skip
def test_mistakes_are_answered_in_one_sentence(saved_tiny, tmp_path, arguments, status, message):
    places = {"{empty}": str(tmp_path), "{tiny}": str(saved_tiny), "{harmless}": str(R.PROMPTS / "harmless.txt")}
    filled = [str(a) for a in arguments]
    for key, place in places.items():
        filled = [a.replace(key, place) for a in filled]
    done = program(*filled, HF_HUB_OFFLINE="1")
    assert done.returncode == status and message in done.stderr, done.stderr


def test_a_model_that_does_not_refuse_is_told_apart(toy, tmp_path):
    for part in toy:
        part.save_pretrained(tmp_path / "untrained")
    done = program("--model", tmp_path / "untrained", *SMALL)
    assert done.returncode == 1 and "no refusal here to explain" in done.stderr


def test_selection_never_sees_test_prompts(tiny, data, found):
    args = SimpleNamespace(layer=None, position=None, exhaustive=False, batch_size=32)
    shuffled = {kind: SimpleNamespace(train=d.train, val=d.val, test=["Hello there", "Good day"]) for kind, d in data.items()}
    chosen = R.find_direction(*tiny, shuffled, args)
    assert (chosen.position, chosen.layer) == (found.position, found.layer) and torch.equal(chosen.vector, found.vector)


def test_docstring_examples():
    assert doctest.testmod(R).failed == 0


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
