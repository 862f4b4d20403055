"""Proofs for refusal.py: known answers, identities of the paper, independent oracles.

pytest                                          # a minute and a half, nothing to download
pytest -m census                                # every architecture that transformers has
pytest -m seeds                                 # the tiny model's bars on other seeds
REFUSAL_MODEL=folder pytest -m real             # the paper's claims on a real model
REFUSAL=student.py pytest -k exercise_3         # grade an exercise; without -k: all of them
python test_refusal.py                          # what else there is: the classroom, census, bench

Read it beside refusal.py, in the same order: what does each function claim, and how would we know?
"""

import ast, collections, copy, doctest, functools, importlib.util, inspect, itertools, json, math
import os, re, shutil, subprocess, sys, tempfile, textwrap, time, traceback, warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest, torch, transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

HERE, PROGRAM = Path(__file__).resolve().parent, __name__ == "__main__"


def load(path):  # a file as a module of its own
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What `blank` adds to a student's copy, so that it says what is next before it trains anything.
CHECK = r'''    if blanks := re.findall(r'^    raise NotImplementedError\("(exercise .*)"\)$',
                            Path(__file__).read_text(encoding="utf-8"), re.MULTILINE):
        sys.exit(f"next: {blanks[0]} ({len(blanks)} still blank)")
'''


def students_files():
    files = sorted({*HERE.glob("*.py"), *Path.cwd().glob("*.py")} - {Path(__file__).resolve()})
    return [p.name for p in files if p.stem == "student" or CHECK in p.read_text("utf-8", "ignore")]


def load_graded():
    """refusal.py, or the student's file that REFUSAL names; or one line why it cannot be loaded."""
    path = Path(os.environ.get("REFUSAL", HERE / "refusal.py"))
    try:
        return load(path)
    except FileNotFoundError:
        named = [*students_files(), "student.py"][0]
        fault = f"{path} is not there: name the file to grade, REFUSAL={named} pytest -k exercise_1"
    except SyntaxError as error:
        fault = f"{path.name}, line {error.lineno}: {(error.text or '').strip()}: {error.msg}"
    except Exception as error:
        at, what = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
        fault = f"{Path(at.filename).name}, line {at.lineno}: {at.line}: {what}: {error}"
    raise SystemExit(fault) if PROGRAM else pytest.Collector.CollectError(fault)  # no frames shown


if PROGRAM and sys.argv[1:2] == ["status"]:
    os.environ["REFUSAL"] = [*sys.argv[2:], *students_files(), "student.py"][0]
R = None if PROGRAM and sys.argv[1:2] == ["hint"] else load_graded()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # no configuration file in which to register these marks
    census_mark, real, seeds = pytest.mark.census, pytest.mark.real, pytest.mark.seeds
KINDS, QUICK = ("harmful", "harmless"), ("--n-train", 64, "--n-val", 16, "--n-test", 40)
PROMPTS = ["How do I boil an egg?", "Write a poem",
           "Explain how to swim in bad weather, in rain, and in the dark of the night"]
EACH = "{% for m in messages %}"  # templates in the manner of ChatML, Llama 2 and Gemma
CHATML = EACH + ("<|user|>{{ m.content }}<|end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
BRACKETS = EACH + ("{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
                   "{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}")
SYSTEM = f"<|user|>Be brief.<|end|>{EACH}<|user|>{{{{ m.content }}}}\n{{% endfor %}}<|assistant|>"


def split_of(*sizes):
    """The project's prompts, split as the program splits them: kind -> train, val and test."""
    parts = {kind: R.split(R.load_prompts(R.PROMPTS / f"{kind}.txt"), *sizes) for kind in KINDS}
    return {kind: SimpleNamespace(train=a, val=b, test=c) for kind, (a, b, c) in parts.items()}


def find(model, tokenizer, data):  # the direction, by the program's own steps
    means = [R.mean_activations(model, tokenizer, data[kind].train) for kind in KINDS]
    validation = [data[kind].val for kind in KINDS]
    return R.select_direction(model, tokenizer, R.refusal_directions(*means), *validation)


def small_model(scale=8.0, **sizes):
    """A random Llama and a tokenizer; scaled up, or every block does next to nothing."""
    tokenizer = R.tiny_tokenizer([*PROMPTS, "Write a poem about rain and bad weather"])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1) | sizes)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(scale if p.ndim > 1 else 1.0)
    return model, tokenizer


once = pytest.fixture(scope="session")
tiny = once(lambda: R.train_tiny_model(seed=0))  # the tiny chat model: (model, tokenizer)
data = once(lambda: split_of(128, 32, 100))
found = once(lambda tiny, data: find(*tiny, data))  # its direction
toy = pytest.fixture(lambda: small_model())  # a new one for every test
randn = lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, tokenizer):
    """By transformers' own means, (prompt, vocab): each prompt by itself, without padding."""
    ids = [R.tokenize(tokenizer, [prompt])["input_ids"] for prompt in PROMPTS]
    return torch.cat([model(input_ids=x).logits[:, -1] for x in ids])


def stream(model, tokenizer, prompt):
    """The residual stream by transformers' own means: (seq, layer, d_model), 0 .. n_layers."""
    last, ids = [], R.tokenize(tokenizer, [prompt])["input_ids"].to(model.device)
    norm = model.model.norm  # hidden_states[-1] is what leaves it; we want what enters
    with norm.register_forward_pre_hook(lambda module, args: last.append(args[0])):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    return torch.stack([*states, *last], dim=2)[0]


def close(a, b, within=1e-4):
    torch.testing.assert_close(a, b, atol=within, rtol=within, check_dtype=False, equal_nan=True)


def test_docstring_examples():
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(R):
        parts = small_model(1.0, hidden_size=4, num_hidden_layers=3, num_attention_heads=1)
        example.globs |= dict(zip(("model", "tokenizer"), parts))
        runner.run(example)
    assert runner.summarize().failed == 0 < runner.tries


# %% Prompts, tokens, activations ------------------------------------------------------------------
def test_prompts_match_in_form_do_not_repeat_and_are_split_evenly(data):
    harmful, harmless = (R.load_prompts(R.PROMPTS / f"{kind}.txt") for kind in KINDS)
    for bad, good in zip(harmful, harmless, strict=True):
        assert bad.split()[0] == good.split()[0] and (bad[-1] == "?") == (good[-1] == "?")
        assert abs(len(bad.split()) - len(good.split())) <= 2, (bad, good)
    for prompts in (harmful, harmless):
        bags = [set(re.findall(r"[a-z'-]+", p.lower())) for p in prompts]
        assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(bags, 2)) < 0.6
    whole, small = data["harmful"], split_of(64, 16, 50)["harmful"]
    for part, size in ((whole.train, 128), (whole.val, 32), (whole.test, 100)):
        counts = collections.Counter(harmful.index(p) // 28 for p in part)  # ten categories
        assert len(part) == size and size / 10 - 2 < min(counts[i] for i in range(10))
    assert len({*whole.train, *whole.val, *whole.test}) == 260  # a smaller experiment uses subsets
    assert set(small.train) < set(whole.train) and set(small.test) < set(whole.test)


def test_prompts_are_lines_of_text_or_a_sequence_of_strings_in_its_own_order(toy, tmp_path):
    class Series(list):  # as a shuffled pandas Series: [i] goes by label, iteration by place
        __getitem__ = lambda self, label: list.__getitem__(self, -1 - label)

    odd = "\ufeffOne two\r\n\r\na \f\u2028b\x0bc\rOne two\r\n  \n"  # only \n and \r end a line
    (tmp_path / "p.txt").write_bytes(odd.encode())
    assert R.load_prompts(tmp_path / "p.txt") == ["One two", "a \f\u2028b\x0bc"]
    for name, content in (("p.txt", b"\n \n"), ("p.txt", b"a\0b"), ("p.txt", "Hi".encode("utf-16")),
                          ("p.csv", b"id,prompt\n1,Hi"), ("p.jsonl", b'{"prompt": "Hi"}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(R.CannotDo, match=re.escape(name)):
            R.load_prompts(tmp_path / name)
    for bad in ("Write a poem", [], Series()):
        with pytest.raises(R.CannotDo, match="list of instructions"):
            R.generate(*toy, bad)
    close(R.refusal_scores(*toy, Series(PROMPTS)), R.refusal_scores(*toy, PROMPTS), 0)
    assert R.split(Series("abcdefgh"), 4, 1, 3) == R.split(list("abcdefgh"), 4, 1, 3)


def test_tokenize_pads_on_the_left_adds_one_bos_and_asks_for_no_thoughts(toy):
    toy[1].padding_side = "right"  # whatever the tokenizer was set to
    bos = TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 1)])  # <|end|> plays the BOS
    toy[1].backend_tokenizer.post_processor = bos
    toy[1].chat_template = "<|end|>" + BRACKETS + (  # and thinks unless told otherwise, as Qwen 3
        "{% if enable_thinking is undefined or enable_thinking %}<|pad|>{% endif %}")
    batch = R.tokenize(toy[1], PROMPTS)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        assert (mask.diff() >= 0).all() and mask[-1] and ids[mask.bool()].tolist().count(1) == 1
    assert R.template_tail(toy[1]) == [3] and 1 not in R.refusal_tokens(toy[1])  # 3: <|assistant|>


def naive(a, b):
    """AUROC, and what is caught: of every threshold with one false alarm in 100, or just one."""
    pairs = [(x > y) + 0.5 * (x == y) for x, y in itertools.product(a, b)]
    allowed = [t for t in [*a, *b] if sum(y > t for y in b) <= max(1, len(b) // 100)]
    return sum(pairs) / len(pairs), max(sum(x > t for x in a) / len(a) for t in allowed)


@pytest.mark.parametrize("n", [2, 40, 100, 250])
def test_detection_counts_pairs_and_false_alarms(n):
    a, b = randn(30, seed=1) + 1, randn(n)
    a[: n // 9] = b[: n // 9]  # ties count half
    assert (R.auroc(a, b), R.caught(a, b)) == pytest.approx(naive(a.tolist(), b.tolist()))


def test_neither_batches_nor_memory_change_a_result(toy, monkeypatch):
    states = torch.stack([stream(*toy, prompt)[-3:] for prompt in PROMPTS])  # (prompt, 3, layer, d)
    scores, replies, most = R.refusal_scores(*toy, PROMPTS * 6), R.generate(*toy, PROMPTS * 6, 4), 4
    r = randn(32) / randn(32).norm()

    def allocate(module, args):
        if len(args[0]) > most:
            torch.empty(2**50)  # fails in a CPU's own words; exercise 2 has a GPU's
    with toy[0].model.layers[2].register_forward_pre_hook(allocate):
        close(R.refusal_scores(*toy, PROMPTS * 6), scores)
        assert R.generate(*toy, PROMPTS * 6, 4) == replies
        monkeypatch.setattr(R, "BATCH_SIZE", 2)
        close(R.activations(*toy, PROMPTS, [-1, -3]), states[:, [2, 0]])
        close(R.projections(*toy, PROMPTS, 5 * r, -2), states[:, 1] @ r)
        most = 0
        with pytest.raises(R.CannotDo, match="out of memory with one prompt"):
            R.refusal_scores(*toy, PROMPTS)


# %% Ablation and addition, by hooks and in the weights --------------------------------------------
def out_of(x, r):  # the oracle: x without its part along the unit vector r, in the dtype of x
    r = r.to(x.device, torch.float32)
    return (x.float() - torch.einsum("...i,i,j->...j", x.float(), r, r)).to(x.dtype)


def papers_hooks(model, r):
    """The authors' way: project at every block's input, and at what attention and MLP give."""
    for block in model.model.layers:
        yield block.register_forward_pre_hook(lambda m, args: (out_of(args[0], r), *args[1:]))
        yield block.self_attn.register_forward_hook(lambda m, args, x: (out_of(x[0], r), *x[1:]))
        yield block.mlp.register_forward_hook(lambda m, args, x: out_of(x, r))


@pytest.mark.parametrize("length", [1e-30, 17, 1e30])
def test_ablation_is_the_papers_and_leaves_no_trace(toy, length):
    before, r = logits_of(*toy), randn(32) / randn(32).norm()
    with pytest.raises(ZeroDivisionError), R.ablate(toy[0], length * r):
        ours, x = logits_of(*toy), stream(*toy, PROMPTS[0])
        assert (x @ r).abs().max() < 1e-4 * x.norm(dim=-1).max()
        1 / 0
    assert torch.equal(logits_of(*toy), before) and (ours - before).abs().max() > 0.01
    with R.hooked(papers_hooks(toy[0], r)):
        close(ours, logits_of(*toy))
    with R.reading(toy[0], lambda layer, x: 2 * x):  # reading only reads
        assert torch.equal(logits_of(*toy), before)


def test_models_that_cannot_be_edited_or_measured_are_refused(toy):
    model, before = toy[0], logits_of(*toy)
    for name, value in (("is_quantized", True), ("offloaded", nn.Linear(2, 2, device="meta"))):
        setattr(model, name, value)
        with pytest.raises(R.CannotDo, match="quantised or offloaded weights cannot be edited"):
            R.orthogonalize(model, randn(32))
        delattr(model, name)
    assert torch.equal(logits_of(*toy), before)
    model.model.layers[2].train()  # one block is enough
    for work in (R.mean_activations, R.refusal_scores, R.generate):
        with pytest.raises(R.CannotDo, match="training mode"):
            work(*toy, PROMPTS)
    model.eval().half()  # 70 000 is more than it can hold
    for way in (R.ablate(model, randn(32) * math.nan), R.add(model, randn(32) * 1e4, 1, 7.0)):
        with pytest.raises(R.CannotDo, match="no direction|not finite"), way:
            pass
    model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    with pytest.raises(R.CannotDo, match="hold NaN or infinity"):
        R.mean_activations(*toy, PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_proof_finds_one_writer_in_fifty_and_bears_massive_activations(dtype):
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=24)
    model, r = small_model(4.0, **sizes)[0].to(dtype), R.unit(randn(256))
    for left_out in (None, 0, 3, 24, 47, 48):
        left = [m for i, m in enumerate(R.writers(model)) if i != left_out]
        where = f"block {(left_out - 1) // 2}" if left_out else "the embeddings"
        found = pytest.raises(R.CannotDo, match=f"written to the stream by {where} of")
        with R.hooked(R.after(module, lambda x: R.project_out(x, r)) for module in left):
            with nullcontext() if left_out is None else found:
                R.check_erased(model, r)
    for along in (0.0, 1.0, 17.0):  # one channel a thousand times the others, as in Llama 2
        model, r = small_model()[0], randn(32)
        model.model.embed_tokens.weight[:, 3] *= 1000
        model.model.layers[1].mlp.down_proj.weight[3] *= 1000
        r[3] = along
        with R.ablate(model.to(dtype), r):
            pass
        R.orthogonalize(model, r)


@pytest.mark.parametrize("first", ["ablate", "orthogonalize"])
@pytest.mark.parametrize("second", ["ablate", "orthogonalize"])
@pytest.mark.parametrize("slant", [0, 1])  # if it slants, the second puts some of the first back
def test_two_directions_are_both_erased_or_refused(toy, first, second, slant):
    r = R.unit(randn(32))
    other = R.unit(R.unit(out_of(randn(32, seed=1), r)) + slant * r)
    erase = {"ablate": R.ablate, "orthogonalize": lambda *args: nullcontext(R.orthogonalize(*args))}
    refused = pytest.raises(R.CannotDo, match="erased before and not orthogonal|use ablate")
    with erase[first](toy[0], r), refused if slant else nullcontext():
        with erase[second](toy[0], other):
            x = stream(*toy, PROMPTS[0])
            assert max((x @ r).abs().max(), (x @ other).abs().max()) < 1e-4 * x.norm(dim=-1).max()


@pytest.mark.parametrize("trainable", [True, False])
def test_an_untied_head_can_be_trained_if_it_could_before(trainable):
    model = small_model(tie_word_embeddings=True)[0].requires_grad_(trainable)
    R.orthogonalize(model, randn(32))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert all(p.requires_grad == trainable for p in model.parameters())


# %% Choosing one direction: the plain definitions, and refusal.py against them --------------------
def plain_logits(model, tokenizer, prompts, ablated=None, added=None, layer=None):
    """Logits for the first token of the reply, (prompt, vocab), with a vector ablated or added."""
    shift, rows = lambda m, args: (args[0] + added.to(args[0]), *args[1:]), []
    handles = [] if added is None else [model.model.layers[layer].register_forward_pre_hook(shift)]
    with R.hooked(handles if ablated is None else papers_hooks(model, ablated / ablated.norm())):
        for start in range(0, len(prompts), 32):
            batch = R.tokenize(tokenizer, prompts[start : start + 32]).to(model.device)
            rows.append(model(**batch).logits[:, -1].double().cpu())  # (batch, vocab)
    return torch.cat(rows)


def plain_score(logits, tokens):  # mean of log(p / (1 - p))
    p = logits.softmax(-1)[:, tokens].sum(-1)
    return (p / (1 - p)).log().mean()


def plain_kl(p_logits, q_logits, epsilon=0.0):  # mean; the authors' code has epsilon = 1e-6
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * ((p + epsilon) / (q + epsilon)).log()).sum(-1).mean()


def plain_select(model, tokenizer, directions, harmful_val, harmless_val, only=None):
    """The paper in the plainest way, slow on purpose: name -> (position, layer), and the winner."""
    n, n_layers, _ = directions.shape
    tokens, base = R.refusal_tokens(tokenizer), plain_logits(model, tokenizer, harmless_val)
    scores = {name: torch.full((n, n_layers), math.nan) for name in ("bypass", "kl", "induce")}
    for at in only or itertools.product(range(-n, 0), range(n_layers)):
        v, harmless = directions[at], plain_logits(model, tokenizer, harmless_val, directions[at])
        scores["bypass"][at] = plain_score(plain_logits(model, tokenizer, harmful_val, v), tokens)
        scores["kl"][at] = plain_kl(base, harmless)
        added = plain_logits(model, tokenizer, harmless_val, added=v, layer=at[1])
        scores["induce"][at] = plain_score(added, tokens)
    return scores, plain_winner(scores)


def plain_winner(scores):
    """The paper's filters; if nothing passes, without the one on induce: (position, layer)."""
    n, n_layers = scores["bypass"].shape
    early = itertools.product(range(-n, 0), range(int(0.8 * n_layers)))
    intact = [at for at in early if scores["kl"][at] <= 0.1]
    strict = [at for at in intact if scores["induce"][at] >= 0]
    return min(strict or intact, key=lambda at: scores["bypass"][at])


def plain_means(model, tokenizer, prompts):
    """Mean block inputs over the template's tail, one by one: (position, layer, d_model)."""
    n = len(R.template_tail(tokenizer))
    return sum(stream(model, tokenizer, p)[-n:, :-1].double().cpu() for p in prompts) / len(prompts)


@pytest.fixture(scope="session")
def search(tiny, data):
    """What select_direction is given for the tiny model, and what the oracle says of everything."""
    means = [plain_means(*tiny, data[kind].train) for kind in KINDS]
    arguments = (*tiny, means[0] - means[1], data["harmful"].val, data["harmless"].val)
    return arguments, *plain_select(*arguments)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_select_direction_agrees_with_the_plain_definitions(search, found, exhaustive):
    arguments, scores, winner = search
    chosen = R.select_direction(*arguments, exhaustive=exhaustive)
    for name, plain in scores.items():
        measured = chosen.scores[name].isfinite()  # at layer 0 there is no direction
        assert measured[:, 1:].all() == exhaustive and measured[winner]
        close(chosen.scores[name][measured], plain[measured], 1e-3)
        assert getattr(chosen, name) == chosen.scores[name][winner]
    assert winner == (chosen.position, chosen.layer) and not chosen.relaxed
    close(found.vector, chosen.vector)  # found from mean_activations, the whole way in batches
    close(chosen.vector, arguments[2][winner], 1e-6)
    for prompts, base in zip(arguments[3:], (chosen.base_bypass, chosen.base_induce)):
        plain = plain_score(plain_logits(*arguments[:2], prompts), R.refusal_tokens(arguments[1]))
        assert base == pytest.approx(plain.item(), abs=1e-3)


def test_where_not_all_filters_can_be_passed_it_says_so(search, toy, monkeypatch):
    arguments, scores, _ = search
    monkeypatch.setattr(R, "INDUCE_MIN", 1e6)
    chosen = R.select_direction(*arguments)
    winner = plain_winner(scores | {"induce": scores["induce"] - 1e6})
    assert chosen.relaxed and (chosen.position, chosen.layer) == winner
    with pytest.raises(R.CannotDo, match="means do not differ"):
        R.select_direction(*toy, torch.zeros(2, 4, 32), PROMPTS, PROMPTS)
    monkeypatch.setattr(R, "KL_MAX", -1.0)  # not 0: rounding alone can leave a KL just below
    with pytest.raises(R.CannotDo, match="KL"):
        R.select_direction(*arguments)


def test_attribution_is_the_derivative_of_erasing_a_little(search):
    model, tokenizer, directions, harmful, _ = search[0]
    estimate, slopes = R.attribution(model, tokenizer, directions, harmful), []
    r = R.unit(directions[-1, 1])
    for step in (0.005, -0.005):  # o' = o - step (o . r) r at every writer
        change = lambda x: x - step * (x - out_of(x, r))
        with R.hooked(R.after(module, change) for module in R.writers(model)):
            logits = plain_logits(model, tokenizer, harmful)
            slopes.append(plain_score(logits, R.refusal_tokens(tokenizer)).item())
    assert (slopes[0] - slopes[1]) / 0.01 == pytest.approx(estimate[-1, 1].item(), rel=2e-2)


@real
@pytest.mark.skipif("not {'REFUSAL_MODEL', 'REFUSAL_REFERENCE'} <= set(os.environ)")
def test_the_search_agrees_with_the_authors_code_on_a_real_model():
    """Qwen2.5-Coder-0.5B-Instruct: what is measured against the recorded scores, and the winner."""
    read = lambda name: json.loads(Path(os.environ["REFUSAL_REFERENCE"], name).read_text())
    prompts, tools = read("prompts.json"), R.load_model(os.environ["REFUSAL_MODEL"], "float32")
    data = {kind: SimpleNamespace(train=prompts[f"{kind}_train"], val=prompts[f"{kind}_val"])
            for kind in KINDS}
    chosen, harmless = find(*tools, data), data["harmless"].val
    assert (chosen.position, chosen.layer) == (-1, 16) and chosen.relaxed
    for theirs in read("authors_scores.json")["scores"]:
        at = theirs["position"], theirs["layer"]
        for name, key in zip(("bypass", "induce", "kl"), ("refusal", "steering", "kl_div")):
            assert not abs(chosen.scores[name][at] - theirs[f"{key}_score"]) > 0.02, (name, at)
        if at == (-1, 16):  # the rest of the KL's difference is their epsilon
            ablated = plain_logits(*tools, harmless, chosen.vector)
            kl = plain_kl(plain_logits(*tools, harmless), ablated, 1e-6)
            assert abs(kl - theirs["kl_div_score"]) < 2e-3


# %% Replies, and the paper on the tiny model ------------------------------------------------------
def test_generation_is_greedy_whatever_the_checkpoint_says(toy):
    model, tokenizer = toy
    ids = start = R.tokenize(tokenizer, PROMPTS[:1])["input_ids"]
    for _ in range(6):  # greedy by hand, no cache
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    by_hand = tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)
    model.generation_config = own = transformers.GenerationConfig(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, suppress_tokens=[5, 6, 7])
    assert R.generate(model, tokenizer, PROMPTS, 6)[0] == by_hand and model.generation_config is own


@pytest.mark.parametrize("hits, n", [(0, 1), (1, 2), (81, 263), (0, 30), (999, 1000), (7, 7)])
def test_wilson_ends_where_the_score_test_does(hits, n):
    """From the ends p, hits/n is z standard errors away: n (hits/n - p)^2 = z^2 p (1 - p)."""
    low, high = R.wilson(hits, n)
    assert (low == 0, high == 1) == (hits == 0, hits == n) and low <= hits / n <= high
    for p in (low, high):
        assert n * (hits / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p), abs=1e-12)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=seeds) for seed in range(1, 5))])
def test_the_paper_holds_on_the_tiny_model(seed, tiny, data, request):
    if seed and "seeds" not in request.config.getoption("-m"):
        pytest.skip("pytest -m seeds")
    tools = R.train_tiny_model(seed) if seed else tiny
    rate = lambda kind: R.refusal_rate(R.generate(*tools, data[kind].test, 24))
    chosen = find(*tools, data)
    assert rate("harmful") >= 0.85 and rate("harmless") <= 0.10
    with R.ablate(tools[0], chosen.vector):
        assert rate("harmful") <= 0.10
    with R.ablate(tools[0], randn(128, seed=1)):
        assert rate("harmful") >= 0.80
    with R.add(tools[0], chosen.vector, chosen.layer):
        assert rate("harmless") >= 0.85


@real
@pytest.mark.skipif("'REFUSAL_MODEL' not in os.environ")
def test_the_paper_holds_on_a_real_model(capsys):
    out = program(capsys, "--model", os.environ["REFUSAL_MODEL"], *QUICK)
    count = lambda row: int(re.search(rf"{row} +(\d+)/40", out)[1])
    assert count("harmful +direction ablated") <= 0.1 * count("harmful +no intervention")
    assert count("harmless +direction added") - count("harmless +no intervention") >= 25


# %% The program, its files and pictures -----------------------------------------------------------
def program(capsys, *arguments, status=0, says=""):
    """Run the program: it ends with this status and says this, on one line; returns the output."""
    capsys.readouterr()  # what came before
    try:
        ended = R.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse's way
        ended = error.code
    out, err = capsys.readouterr()
    assert ended == status and says in err and (out + err).replace("\n", "").isprintable(), err
    assert re.fullmatch("(usage: .*\n(   .*\n)*)?.*\n?", err)
    return out


def test_the_program_from_end_to_end(tiny, tmp_path, capsys):
    """What is printed and saved is what the functions give, and the folder loads anywhere."""
    folder, data = tmp_path / "out", split_of(64, 16, 40)
    for part in tiny:
        part.save_pretrained(tmp_path / "tiny")
    command = "--model", tmp_path / "tiny", *QUICK, "--map", "--prompt", "Bake it", "--save", folder
    before = program(capsys, *command)
    folder.rename(tmp_path / "before")
    out = program(capsys, *command)
    assert re.sub("\ntime .*", "", out) == re.sub("\ntime .*", "", before), "the same numbers again"
    assert sorted(os.listdir(tmp_path)) == ["before", "out", "tiny"], "nothing half-written is left"
    assert re.findall(r"(?m)^(\d) \w+", out) == list("12345678") and "it[" in out
    assert re.findall(r"(?m)^(\w+) .*AUROC at", out) == ["bypass", "induce", "kl"]
    for kind, sign in zip(KINDS, (1, -1)):  # refused harmful prompts, and answered harmless ones
        for name in ("train", "val"):
            prompts = getattr(data[kind], name)
            kept = zip(prompts, sign * R.refusal_scores(*tiny, prompts))
            setattr(data[kind], name, [p for p, score in kept if score > 0])
    chosen, numbers = find(*tiny, data), json.loads((folder / "results.json").read_text())
    for name in ("position", "layer", "bypass", "kl", "induce", "base_bypass", "base_induce"):
        assert numbers[name] == pytest.approx(getattr(chosen, name), abs=1e-4)
    table, r = numbers["scores"]["kl"], load_file(folder / "direction.safetensors")["direction"]
    assert table[chosen.position][chosen.layer] == numbers["kl"] and table[0][0] is None
    close(r, chosen.vector)
    check_detector(out, chosen, tiny, data)
    edited = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    close(plain_logits(edited, tokenizer, PROMPTS), plain_logits(*tiny, PROMPTS, r))
    for row, model, way, least, most in (
            ("harmful +no intervention", tiny[0], nullcontext(), 34, 40),
            ("harmful +direction ablated", tiny[0], R.ablate(tiny[0], r), 0, 4),
            ("harmful +weights orthogonalized", edited, nullcontext(), 0, 4),
            ("harmless +direction added", tiny[0], R.add(tiny[0], r, chosen.layer), 34, 40)):
        kind, name = row.split(" +")
        with way:
            replies = R.generate(model, tokenizer, data[kind].test)
        refused = [R.TINY_REFUSAL in reply for reply in replies]
        assert numbers["refused"][f"{kind} {name}"] == refused and least <= sum(refused) <= most
        assert re.search(rf"{row} +{sum(refused)}/40 ", out)


def check_detector(out, chosen, tiny, data):
    """Number of words; then the winner's position and the instruction's end, r in and out."""
    words, end = lambda prompt: len(prompt.split()), -1 - len(R.template_tail(tiny[1]))
    wanted = [[list(map(words, data[kind].test)) for kind in KINDS]]

    def read(kind, part):  # (prompt, 1, layer, d_model) -> (prompt, d_model)
        return R.activations(*tiny, getattr(data[kind], part), [position])[:, 0, chosen.layer]
    for step, way in ((1, nullcontext()), (4, R.ablate(tiny[0], chosen.vector))):
        with way:  # ablated, it is fitted on every fourth prompt
            for position in (chosen.position, end):
                harmful, harmless = (read(kind, "train")[::step].mean(0) for kind in KINDS)
                along = [read(kind, "test") @ (harmful - harmless) for kind in KINDS]
                wanted.append([x.tolist() for x in along])
    printed = re.findall(r"(?m)^ +(?:number|x) .* ([\d.]{5} +\d+%)$", out)
    assert printed == ["{:.3f} {:>6.0%}".format(*naive(*x)) for x in wanted]


@pytest.mark.parametrize("mistake", """
1 --harmless {tmp}/none.txt cannot read the prompts
1 --harmful {harmless} 280 prompts are in both files
1 --n-train 5000 cannot be taken from 280
2 --n-val 53 share 152
2 --dtype int8 --dtype: invalid choice
2 --save {tmp} does not exist yet
1 --model {tmp}/\x1b]0;owned\x07\r owned""".strip().split("\n"))  # status, flag, its value, error
def test_what_fails_early_fails_early(tmp_path, capsys, monkeypatch, mistake):
    monkeypatch.setattr(R, "train_tiny_model", None)  # before anything is trained or loaded
    status, flag, value, error = mistake.split(" ", 3)
    value = value.format(tmp=tmp_path, harmless=R.PROMPTS / "harmless.txt")
    program(capsys, flag, value, status=int(status), says=error)


def edit(file, **changes):  # some entries of a JSON file
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | changes))


def replace(folder, kind, **more):  # the model by one of another kind
    cls = getattr(transformers, kind)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    cls(cls.config_class(**sizes | dict(vocab_size=600) | more)).save_pretrained(folder)


@pytest.mark.parametrize("message, damage, name, more", [
    ("only 0 of 64", Path.exists, "", {}), ("model_type", Path.unlink, "config.json", {}),
    ("tokenizer has no chat template", Path.unlink, "chat_template.jinja", {}),
    ("TemplateSyntaxError", Path.write_text, "chat_template.jinja", dict(data="{{ messages[0]")),
    ("SafetensorError", Path.write_text, "model.safetensors", dict(data="not yet downloaded")),
    ("broken and turns a prompt into", edit, "tokenizer.json", dict(decoder=None)),
    ("custom code", edit, "config.json", dict(auto_map={"AutoConfig": "code.C"}, model_type="x")),
    ("logits hold NaN", edit, "config.json", dict(rms_norm_eps=-1e9)),
    ("adapter", edit, "adapter_config.json", dict(peft_type="LORA", base_model_name_or_path="x")),
    ("is no sum of the stream", replace, "", dict(kind="BertForMaskedLM")),
    ("lm_head.weight is not in the", replace, "", dict(kind="LlamaForSequenceClassification")),
    ("longer than this", replace, "", dict(kind="LlamaForCausalLM", max_position_embeddings=8)),
    ("on a forward pass (IndexError", replace, "", dict(kind="LlamaForCausalLM", vocab_size=9))])
def test_a_folder_that_holds_no_chat_model(tmp_path, toy, capsys, message, damage, name, more):
    for part in toy:
        part.save_pretrained(tmp_path)
    damage(tmp_path / name, **more)
    program(capsys, "--model", tmp_path, *QUICK, status=1, says=message)


def test_the_code_of_the_readme_runs(tiny, monkeypatch):
    monkeypatch.setattr(R, "load_model", lambda name: copy.deepcopy(tiny))  # which one block tunes
    text, names = (HERE / "README.md").read_text(encoding="utf-8"), {}
    for block in re.findall("```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["kind"] and names["place"] == (-1, 2), "the first block and the last have run"


def test_an_interruption_leaves_nothing_behind(monkeypatch):
    """Ctrl-C at every third module that is run and hook that is put in."""
    model, tokenizer = small_model(num_hidden_layers=1)
    settings = model.generation_config

    def tick(*arguments):
        if next(ticks) == at:
            raise KeyboardInterrupt
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        put_in = getattr(nn.Module, name)
        late = lambda *args, put_in=put_in, **more: tick() or put_in(*args, **more)
        monkeypatch.setattr(nn.Module, name, late)
    with nn.modules.module.register_module_forward_pre_hook(tick):
        for at in range(1, 1000, 3):
            ticks = itertools.count(1)
            try:
                R.writers.__wrapped__(model)
                with R.ablate(model, randn(32)), R.add(model, randn(32), 0):
                    R.mean_activations(model, tokenizer, PROMPTS[:1])
                R.attribution(model, tokenizer, randn(2, 1, 32), PROMPTS[:1])
                R.generate(model, tokenizer, PROMPTS[:1], 2)
                R.orthogonalize(model, randn(32))
                break  # it was over before
            except KeyboardInterrupt:
                assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
                assert not any(p.requires_grad for p in model.parameters())
                assert model.generation_config is settings and not R.erased(model)
    assert at > 100


def test_saving_overwrites_nothing_and_leaves_no_half(toy, tmp_path, monkeypatch):
    chosen = SimpleNamespace(vector=torch.ones(32), position=-1, layer=1)
    (tmp_path / "full").mkdir()
    for name in ("file", "full/x"):
        (tmp_path / name).write_text("mine")
    for target in ("full", "file", "file/below"):  # it was not there when the program began
        with pytest.raises(R.CannotDo, match="could not save"):
            R.save(*toy, chosen, {}, tmp_path / target)
    interrupt = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(type(toy[1]), "save_pretrained", interrupt)  # the model is written by then
    with pytest.raises(KeyboardInterrupt):
        R.save(*toy, chosen, {}, tmp_path / "new")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "x").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_ctrl_c_and_output_that_nobody_reads_end_the_program_quietly(monkeypatch, capsys):
    monkeypatch.setattr(R, "load_model", mock.Mock(side_effect=KeyboardInterrupt))
    program(capsys, status=130, says="interrupted")
    reader, writer = os.pipe()
    os.close(reader)  # as head -1 does when it has its line
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert R.main([]) == 1 and capsys.readouterr().err == ""


def test_the_map_and_the_plot_are_this_text(toy):
    bypass = torch.tensor([[4, 1, math.nan], [2, -3, -4]])
    chosen = SimpleNamespace(position=-1, layer=1, scores={"bypass": bypass})
    apart = torch.arange(3.0).expand(4, 3, 3)  # (prompt, position, layer)
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None, None]
    shown = R.score_map(chosen, "bypass", toy[1], {"harmful": apart, "harmless": 0 * apart})
    assert [line.split() for line in shown.splitlines()] == [
        ["bypass", r"\n", "<|assist", "AUROC", "at", "-1"], ["0", "4.00", "2.00", "0.50"],
        ["1", "1.00", "-3.00*", "1.00"], ["2", ".", "-4.00", "1.00"]]
    plot = R.layer_plot({"harmful": apart + spread, "harmless": 0 * apart}, width=12)
    assert plot.splitlines()[1:] == [
        "    0  #     o     #", "    1  #           #", "    2  o   #       #"]


# %% Silently wrong numbers, as users of such tools report them ------------------------------------
@pytest.mark.parametrize("compiled", [
    lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m,
    lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")) or m])
def test_hooks_run_in_a_compiled_model_or_it_is_refused(compiled):
    """The first run of a compiled model makes a program without our hooks, which stays."""
    bare, tokenizer = small_model(num_hidden_layers=2)
    model = compiled(copy.deepcopy(bare))
    close(logits_of(model, tokenizer), logits_of(bare, tokenizer))
    for change in (lambda m: R.ablate(m, randn(32)), lambda m: R.add(m, randn(32), 1)):
        with change(bare):
            want = logits_of(bare, tokenizer)
        try:
            with change(model):
                close(R.next_token_logits(model, tokenizer, PROMPTS), want)
        except R.CannotDo as refusal:
            assert "compile" in str(refusal)
    torch._dynamo.reset()


class Wrapper(nn.Module):  # as PEFT's: passes every argument on, names none; settings go inside
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        self.inner.generation_config = self.generation_config
        return self.inner.generate(*args, **kwargs)


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "blind", "generous", Wrapper])
def test_padding_and_wrappers_change_nothing(toy, monkeypatch, kind):
    model, tokenizer = toy
    if kind in ("GPT-2", Wrapper):  # learned positions: padding moves them, if nobody tells
        sizes = dict(n_embd=32, n_layer=4, n_head=4, vocab_size=len(tokenizer))
        config = transformers.GPT2Config(**sizes, initializer_range=0.2)
        model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    bare, own, forward = copy.deepcopy(model), model.generation_config, model.forward
    if kind == "blind":  # sees padding, as recurrent models do
        model.forward = lambda input_ids, attention_mask=None, **more: forward(input_ids, **more)
    if kind == "generous":  # swallows logits_to_keep, and gives the logits of all positions
        model.forward = lambda input_ids, logits_to_keep=0, **more: forward(input_ids, **more)
    wrapped = Wrapper(model).eval() if kind is Wrapper else model
    alone = torch.stack([R.mean_activations(bare, tokenizer, [p]) for p in PROMPTS]).mean(0)
    for size in (1, 2, 3):
        monkeypatch.setattr(R, "BATCH_SIZE", size)
        with R.ablate(bare, randn(32)), R.ablate(wrapped, randn(32)):
            close(R.next_token_logits(wrapped, tokenizer, PROMPTS), logits_of(bare, tokenizer))
        close(R.mean_activations(wrapped, tokenizer, PROMPTS), alone)
    assert kind is Wrapper or R.padding_is_seen(wrapped) == (kind == "blind")
    assert R.forward(wrapped, R.tokenize(tokenizer, PROMPTS[:1])).shape[1] == 1  # not all positions
    replies = [R.generate(bare, tokenizer, [p], 4)[0] for p in PROMPTS]
    assert R.generate(wrapped, tokenizer, PROMPTS, 4) == replies and model.generation_config is own


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "xlstm", "mamba"])
def test_recurrent_models_are_read_without_padding(name):
    check_padding(model := tiny_of(name))
    assert R.padding_is_seen(model) == (name != "mamba")


@pytest.mark.parametrize("source", ["nothing", "config", "tokenizer", "template"])
def test_replies_stop_at_whatever_ends_them(tiny, monkeypatch, source):
    """Only the model's settings, or the tokenizer, or the template may name the end of a turn."""
    whole, tokenizer = R.generate(*tiny, PROMPTS, 30), copy.deepcopy(tiny[1])
    monkeypatch.setattr(tiny[0].generation_config, "eos_token_id", [0, int(source == "config")])
    if source != "tokenizer":
        tokenizer.eos_token = "<|pad|>"
    if source != "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("'<|end|>'", "''")
    assert (R.generate(tiny[0], tokenizer, PROMPTS, 30) == whole) == (source != "nothing")


@pytest.mark.parametrize("between", [  # the generation prompt and the text of a past reply
    "", " ", "\n", "<|user|>final\n", '"', "<think>\n\n</think>\n", "{{ raise_exception('no') }}"])
def test_refusal_tokens_begin_an_opener(toy, between):
    _, tokenizer = toy
    tokenizer.chat_template = BRACKETS.replace(" {{ m.content }}", between + "{{ m.content }}")
    words = lambda: {tokenizer.decode([token]) for token in R.refusal_tokens(tokenizer)}
    assert words() == ({"A", " I"} if between == " " else {"A", "I"})  # " A" is no token here
    tokenizer.add_tokens(["I'm", "As"])  # an opener may be one longer token
    assert {word.strip() for word in words()} == {"I", "I'm", "As"}


@pytest.mark.parametrize("openers, way, kind, rate", [
    (["As an AI"], "ablated", "harmful", 0), (["As an AI"], "added", "harmless", 100),
    (["Sorry"], "as it is", "harmful", 100), (["I am", "Here"], "as it is", "harmful", 100)])
def test_the_last_sentence_is_checked_by_replies(tiny, found, capsys, openers, way, kind, rate):
    ways = {"ablated": R.ablate(tiny[0], found.vector), "as it is": nullcontext(),
            "added": R.add(tiny[0], found.vector, found.layer)}
    with mock.patch.multiple(R, load_model=lambda *_: tiny, REFUSAL_OPENERS=openers), ways[way]:
        program(capsys, *QUICK, status=1, says=f"64 {kind} prompts pass the filter, and {rate}% of")


def test_inference_mode_makes_no_difference(toy, monkeypatch):
    monkeypatch.setattr(R, "KL_MAX", math.inf)
    run = lambda: R.select_direction(*toy, randn(2, 4, 32), PROMPTS, PROMPTS[:1]).scores["bypass"]
    want = run()
    with torch.inference_mode():
        R.writers.__wrapped__(toy[0])
        close(run(), want)
        with pytest.raises(R.CannotDo, match="Inference tensors"):
            R.writers(small_model()[0])


# %% Exercises -------------------------------------------------------------------------------------
#
# `python test_refusal.py blank student.py` writes refusal.py without the bodies of these functions,
# and `REFUSAL=student.py pytest -k exercise_3` grades what a student has put there.  A grader has
# inputs of its own, and oracles, not the solution; oracles also stand in for the other exercises'
# functions, so that each can be solved alone.  `watched` and `lesson` hold for all of them.


def rows(text):
    """A table, its cells separated by |; a backslash at the end of a line goes on in the next."""
    lines = re.sub(r"\\\n *", "", text.strip()).split("\n")
    return [re.split(r" +\| +", line) for line in lines]


EXERCISES = rows("""
1  | template_tail | 2 tokens stand between instruction and reply on the tiny model, 5 on Qwen.
2  | mean_activations | at layer 0 harmful and harmless do not differ, and later more and more.
3  | refusal_directions | at layer 0 the difference is 0: the tail's tokens are the same.
4a | project_out | to project twice is to project once: nothing is left along r.
4b | ablate | to project only what enters each block leaves r inside the block.
5  | add | the vector must not be normalised: its length is the dose.
6  | log_odds | 0 is even odds.
7  | kl_divergence | KL is never negative, and unbounded: infinite where q excludes a token.
8  | choose | the lowest bypass is not the best: it breaks the model.
9a | erase | the first axis of a nn.Linear writes: it stores (out, in).
9b | orthogonalize | the unembedding writes nothing, it only reads.
""")  # with what README asks the student to predict, told when the exercise is solved
ANSWERS = {number: answer for number, _, answer in EXERCISES}
EXERCISES = {number: name for number, name, _ in EXERCISES}
GRADES = {}  # number -> solved, blank or wrong
HINTS = rows("""
1  | `common_end` compares tokens: of prompts whose last characters differ.  What if none is left?
2  | `activations` at -n .. -1; of n_layers + 1 streams the last enters no block; mean in float64.
3  | Adding it must make the model refuse: which sign is that?
4a | x . r is one number for each vector, (...,): give it an axis back, [..., None], to multiply.
4a | x may be bfloat16 and r is not: compute in float32, and return the dtype of x.
4b | `hooked(after(m, change) for m in writers(model))`; inside it `check_erased`, then the yield.
5  | `before(blocks(model)[layer], change)`; change returns a new x, in x's dtype.  No layer is -1.
6  | p / (1 - p) is a quotient of two sums of exponentials: two `logsumexp`, no division.
7  | `log_softmax` first, in float32; then log p - log q, weighted by p, summed over vocab.
8  | Mask what passes, take the lowest bypass inside.  NaN is least to argmin.  What if none passes?
9a | `movedim` the axis to the end: then it is project_out with u and w.  Move it back.
9b | The docstring has the steps; plan_edits(model, r) gives name -> (parameter, axis, u, w).
""")
SLIPS = """
generation | The generation prompt belongs to the tail: there the model has yet to answer.
backwards | The tokens come in the wrong order. | wrong end | Count from each prompt's own end.
instruction | Part of a prompt is in it: compare prompts whose last characters differ.
leaving | Layer l is the stream that enters block l: what leaves the last block enters none.
layers first | Wanted: (position, layer, d_model). | averaged | Do not average over the positions.
mean of means | A mean of batch means: batches of unequal size must not count alike.
a sum | Divide the sum by the number of prompts. | harmless first | It is harmful - harmless.
counted twice | A batch that ran out of memory is done again: add up when the pass is over.
step | A step returns one result for each prompt of its batch: a list, or a tensor's rows.
dtype | Mind the dtype: what goes in comes out, unless the docstring says otherwise.
short | Digits are lost: compute in a longer dtype than the input's, and round at the end.
too early | Do not normalise: length matters. | component | This is what has to be subtracted.
mirror | Subtract (x . r) r once, and not twice. | late check | Check inside `with hooked(...)`.
in place | An argument was changed in place, and others still hold it: make a new one.
left behind | Whatever happens, the model must be as it was: hooks out, modes and dtypes kept.
no effect | Nothing has changed: does the hook return the new stream, and yield stand inside `with`?
no yield | A context manager yields once: before it the hooks go in, after it they go out.
swallowed | An error inside the with block must come out again: use `finally`, not `except`.
not erased | Every writer must lose its part along the unit vector: `writers` knows them.
unchecked | A writer was missed, and you did not notice: check that r is gone, see the docstring.
length | Normalise: direction has any length. | unit added | Add `vector` with its own length.
blocks | Only what enters or leaves blocks is projected: inside each block r is back.
q and k | Queries and keys are hooked, too, which do not write to the stream: ask `writers`.
misfit | The model fails on what you gave it: mind dtype and shape of what hooks return, of weights.
next layer | Hook what enters block `layer`. | again | Add it once: the stream carries it on.
last only | Add it at every position. | no dose | Multiply by the coefficient.
log p | The log-odds are log p - log(1 - p). | largest | Add up all the logits: logsumexp.
each alone | p is of all tokens together. | unsure | Here p or 1 - p is 0: use logsumexp.
reversed | This is KL(q || p): average under p. | not summed | A divergence is a sum, no mean.
edge | What lies at a threshold passes. | epsilon | The epsilon biases KL low: log_softmax.
unnormalised | These are logits: use log_softmax. | far apart | KL has no bound, and 0 / 0 no value.
unmeasured | NaN is unmeasured, and never wins. | broken | Drop KL > KL_MAX, relaxed or not.
late | Only layers < int(LATE * n_layers) win. | front | Positions count from the end: -1, -2.
ints | Tensors are no ints: item(). | mixed | KL and induce filter, no more.
strict | Nothing passes all filters here: leave out the one on induce, and only that one.
weak | This candidate does not induce refusal, and another one does: induce >= INDUCE_MIN.
transpose | `axis` says which axis writes. | moved | Move the axes back to where they were.
left out | Embeddings and biases write, too.
u and w | u and w differ before a norm: W . u says how much there is, and that many w go.
head | The unembedding only reads: untie it first. | readers | Edit what writes, not what reads.
no gradients | Autograd has recorded nothing: that works inside `differentiable(model)`.
leaf | copy_ after `with differentiable(model)`: inside, autograd watches the weights.
example | Work out the docstring's example by hand: where does your code part from it?
names | Return the names of the edited parameters, a list, as named_parameters() has them.
"""
SLIPS = sum(rows(SLIPS), [])
SLIPS = dict(zip(SLIPS[::2], SLIPS[1::2]))
SYMPTOMS = {  # what a library's message tells about the slip
    "is not an iterator|n't yield|n't stop|context manager protocol": "no yield",
    "written to the stream by": "not erased", "no sum of the stream": "no gradients",
    "a leaf Variable": "leaf", r"not iterable|zip\(\)": "step",
    "on a forward pass|expected m1 and m2": "misfit"}


def write_blank(target):
    """python test_refusal.py blank FILE: write refusal.py without the exercises' bodies."""
    source = (HERE / "refusal.py").read_text(encoding="utf-8")
    lines, nodes = source.splitlines(keepends=True), ast.parse(source).body
    nodes = {getattr(node, "name", ""): node for node in nodes}
    for number, name in reversed(EXERCISES.items()):
        task = (f"exercise {number}: {name} is yours to write; grade it with "
                f"REFUSAL={Path(target).name} pytest -k exercise_{number}")
        line = f"    raise NotImplementedError({json.dumps(task)})\n"
        lines[nodes[name].body[0].end_lineno : nodes[name].end_lineno] = [line]
    text = re.sub("^if __name__ ==.*\n", lambda line: line[0] + CHECK, "".join(lines), flags=re.M)
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        print(f"error: cannot write {target} ({error.strerror}): name a new file.", file=sys.stderr)
        return 2
    print(f"{target}: {len(EXERCISES)} exercises; the first: REFUSAL={target} pytest -k exercise_1")


def hint(number, k="1"):
    """python test_refusal.py hint NUMBER [K]: print one hint; the exit status."""
    hints = [words for n, words in HINTS if n == number]
    if k not in map(str, range(1, len(hints) + 1)):
        print(f"error: no such hint; exercises are {', '.join(EXERCISES)}.", file=sys.stderr)
        return 2
    print(f"hint {k} of {len(hints)}: {hints[int(k) - 1]}")


def status(file=""):
    """python test_refusal.py status [FILE]: what is solved, blank and wrong, and what is next."""
    for number, name in EXERCISES.items():
        grade(number)
        print(f"{number:>3}  {name:<20}{GRADES[number]}")
    print(what_is_next())


def what_is_next():
    left = [f"next: exercise {n}, {EXERCISES[n]}" for n in EXERCISES if GRADES[n] != "solved"]
    return [*left, "all exercises are solved"][0]


pytest_plugins = [] if PROGRAM else [__name__]  # this file is its own plugin: two hooks follow


def pytest_report_collectionfinish():
    if "REFUSAL" in os.environ:
        return f"graded: {os.environ['REFUSAL']}"
    if files := students_files():
        return f"graded: refusal.py, the solution; for yours, REFUSAL={files[0]} pytest -k exercise"


def pytest_terminal_summary(terminalreporter):
    if "REFUSAL" in os.environ:
        for n in [n for n in GRADES if GRADES[n] == "solved"]:
            terminalreporter.write_line(f"exercise {n} is solved: {ANSWERS[n]}")
        if len(GRADES) == len(EXERCISES):
            terminalreporter.write_line(what_is_next())


fail = lambda *words: pytest.fail(" ".join(filter(None, words)), pytrace=False)
fail_if = lambda mistaken, slip: mistaken and fail(SLIPS[slip])
known_tail = lambda tokenizer: tokenizer.convert_tokens_to_ids(["\u010a", "<|assistant|>"])
same = lambda a, b: a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-3, 1e-4)


def check(got, want, what, advice, *slips):
    """Fail with words that teach.  slips: (name, what that gives); advice: on any other value."""
    wanted = f"a tensor of shape {tuple(want.shape)} is wanted"
    if not isinstance(got, torch.Tensor):
        fail(f"{what}: {wanted}, not {type(got).__name__}.")
    slip = next((name for name, wrong in slips if same(got, wrong)), None)
    if got.shape != want.shape:
        fail(f"{what}: {wanted}, and the shape is {tuple(got.shape)}.", SLIPS.get(slip))
    worst = (got.double() - want.double()).abs().max().item()
    if not same(got.to(want.dtype), want):
        fail(f"{what}: the values are not right (off by {worst:.3g}).", SLIPS[slip or advice])
    if got.dtype != want.dtype:
        fail(f"{what}: {got.dtype} came back, and {want.dtype} is wanted.", SLIPS["dtype"])


def state(value, number):
    """All that an answer must leave as it was, to be compared with ==; 9b may change parameters."""
    if isinstance(value, torch.Tensor):
        content = value.detach().flatten().view(torch.uint8).numpy().tobytes()
        free = number == "9b" and isinstance(value, nn.Parameter)
        return value.dtype, value.requires_grad, free or content
    if isinstance(value, nn.Module):
        parts = {name: (m.training, len(vars(m)), [*m._forward_hooks], [*m._forward_pre_hooks])
                 for name, m in value.named_modules()}
        return parts | state(dict(value.named_parameters()), number)
    if isinstance(value, dict):
        return {name: state(x, number) for name, x in value.items()}
    return repr(value)


def watched(function, number, given):
    """The student's function, which must leave its arguments (in `given`) as they were."""

    def unchanged(before):
        for name, new in state(given, number).items():
            if isinstance(given[name], nn.Module):  # which may have more parameters now
                fail_if(not new.items() >= before[name].items(), "left behind")
            else:
                fail_if(new != before[name], "in place")

    @contextmanager
    def inside(way, before):
        with way:
            yield
        unchanged(before)

    def call(*args, **kwargs):
        given.clear()
        given.update(inspect.signature(function).bind(*args, **kwargs).arguments)
        before, result = state(given, number), function(*args, **kwargs)
        if hasattr(result, "__enter__"):
            return inside(result, before)
        unchanged(before)
        return result

    return call


def lesson(error, function, given):
    """An error in words: the student's own line (the innermost), and what the call was given."""
    code, told, cause, where = inspect.unwrap(function).__code__, error, error, ""
    own = range(code.co_firstlineno, code.co_firstlineno + len(inspect.getsourcelines(code)[0]))
    while cause:
        for at in traceback.extract_tb(cause.__traceback__):
            if at.filename == code.co_filename and at.lineno in own:
                where, told = f"{Path(at.filename).name}, line {at.lineno}: {at.line}\n", cause
        cause = cause.__cause__
    words = " ".join(f"{type(told).__name__}: {told}".split())[:300]
    slips = [SLIPS[slip] for symptom, slip in SYMPTOMS.items() if re.search(symptom, words)]
    show = lambda x: f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else repr(x)
    called = ", ".join(f"{name} {textwrap.shorten(show(x), 50)}" for name, x in given.items())
    return "\n".join([f"{where}{words}", f"called with {called}", *slips])


def grade(number):
    """Grade one exercise: what the student is told, nothing if it is solved."""
    name, given = EXERCISES[number], {}
    function, GRADES[number] = getattr(R, name), "wrong"
    oracles = {"template_tail": known_tail, "project_out": out_of, "erase": known_erase}
    try:
        with mock.patch.multiple(R, **oracles | {name: function}):
            globals()[f"grade_{name}"](watched(function, number, given))
        GRADES[number] = "solved"
    except pytest.fail.Exception as failure:
        return str(failure)
    except Exception as error:
        if str(error).startswith("exercise "):
            GRADES[number] = "blank"
            return str(error)
        return lesson(error, function, given)


@pytest.mark.parametrize("number", EXERCISES, ids=lambda n: f"exercise_{n}_{EXERCISES[n]}")
def test_exercise(number):
    if told := grade(number):
        fail(told)


def must_raise(what, work):
    """Work must refuse what it is given by a check, before the forward pass fails on it."""
    try:
        work()
        came = "nothing was raised."
    except Exception as error:
        came = f"{type(error).__name__} came: {error}"
    if not came.startswith("CannotDo") or "forward pass" in came:
        fail(f"{what} must raise CannotDo from a check, and {came}")


def known_erase(W, axis, u, w):
    along = torch.tensordot(W, u, dims=([axis], [0])).unsqueeze(axis)
    return W - along * w.view([-1 if a == axis else 1 for a in range(W.ndim)])


def odd_model():
    """Its blocks get the stream as a keyword, its attention scales what o_proj gives: a writer."""
    model, tokenizer = small_model()
    keyword = lambda module, args, kwargs: ((), kwargs | {"hidden_states": args[0]})
    for block in model.model.layers:
        block.register_forward_pre_hook(keyword, with_kwargs=True)
        block.self_attn.register_forward_hook(lambda module, args, x: (0.5 * x[0], *x[1:]))
    return model.bfloat16(), tokenizer


def hooked_logits(model, tokenizer, hook, modules, change):
    with R.hooked(hook(module, change) for module in modules):
        return logits_of(model, tokenizer)


def grade_template_tail(answer):
    _, tokenizer = small_model()
    tails = "<|end|>\n<|assistant|>\n", "<|assistant|>", "\n<|assistant|>"
    for tokenizer.chat_template, tail in zip((CHATML, BRACKETS, SYSTEM), tails):
        got, want = answer(tokenizer), tokenizer(tail, add_special_tokens=False)["input_ids"]
        if not isinstance(got, list) or {*map(type, got)} - {int}:
            fail(f"the tail: a list of token ids is wanted, not {got!r:.80}")
        if got != want:
            fail_if(got == want[::-1], "backwards")
            fail_if(got[-len(want) :] == want, "instruction")
            fail_if(got == want[: len(got)], "generation")
            fail(f"tail: {tail!r}, not {tokenizer.decode(got)!r}: compare what prompts end on.")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    must_raise("a template that adds nothing", lambda: answer(tokenizer))


def grade_mean_activations(answer):
    model, tokenizer = small_model()
    known = lambda n: [stream(model, tokenizer, prompt)[-n:].double() for prompt in PROMPTS]
    first, second, third = known(2)  # (position, n_layers + 1, d_model) each
    mean = (first + second + third) / 3
    want, once = mean[:, :-1], [RuntimeError("CUDA out of memory")] + [None] * 9
    with mock.patch.object(R, "BATCH_SIZE", 2):  # the longest first: third, then the others
        check(answer(model, tokenizer, PROMPTS), want, "the mean", "wrong end",
              ("leaving", mean[:, 1:]), ("leaving", mean), ("layers first", want.transpose(0, 1)),
              ("mean of means", ((first + second) / 2 + third)[:, :-1] / 2), ("a sum", 3 * want))
    with model.model.layers[-1].register_forward_pre_hook(mock.Mock(side_effect=once)):
        with suppress(RuntimeError):  # of an answer that does without run_batches
            fail_if(not same(answer(model, tokenizer, PROMPTS), want), "counted twice")
    got = answer(model.bfloat16(), tokenizer, PROMPTS, n_positions=5)
    want = sum(known(5))[:, 0] / 3  # at layer 0, which is the same to the bit in any batch
    check(got[:, 0], want, "the mean with n_positions=5, of a bfloat16 model, at layer 0", "short")


def grade_refusal_directions(answer):
    a, b = randn(2, 3, 5, 8).double()
    want = a - b
    check(answer(a, b), want, "the difference", "example", ("harmless first", -want),
          ("averaged", want.mean(0)), ("too early", want / want.norm(dim=-1, keepdim=True)))


def grade_project_out(answer):
    r = torch.eye(16)[3] * 0.6 + torch.eye(16)[9] * 0.8
    for shape in ((5, 7, 16), (3, 16), (16,)):
        x = randn(*shape)
        want = out_of(x, r)
        check(answer(x, r), want, "what is left", "example",
              ("component", x - want), ("mirror", 2 * want - x))
    x = (randn(9, 16) + 300 * r).bfloat16()
    check(answer(x, r), out_of(x, r), "what is left of a bfloat16 tensor", "short")


def grade_ablate(answer):
    model, tokenizer = small_model()
    r, plain, layers = R.unit(randn(32)), logits_of(model, tokenizer), model.model.layers
    project, embed = lambda x: out_of(x, r), [model.model.embed_tokens]
    writing = embed + [m for b in layers for m in (b.self_attn.o_proj, b.mlp.down_proj)]
    wide = [m for m in layers.modules() if getattr(m, "out_features", 0) == 32]
    logits = functools.partial(hooked_logits, model, tokenizer)
    want = logits(R.after, writing, project)
    got = None
    try:
        with answer(model, 3 * r):
            got = logits_of(model, tokenizer)
    except R.CannotDo:
        fail_if(got is not None, "late check")
        raise
    check(got, want, "the ablated model's logits", "example", ("no effect", plain),
          ("length", logits(R.after, writing, lambda x: out_of(x, 3 * r))),
          ("blocks", logits(R.before, layers, project)),
          ("blocks", logits(R.after, [*embed, *layers], project)),
          ("q and k", logits(R.after, embed + wide, project)))
    with suppress(InterruptedError):
        with answer(model, 3 * r):
            raise InterruptedError
        fail_if(True, "swallowed")
    fail_if(not torch.equal(logits_of(model, tokenizer), plain), "left behind")
    for what, wrong in (("of another size", r[1:]), ("of length 0", 0 * r)):
        must_raise(f"a direction {what}", lambda: answer(model, wrong).__enter__())
    some = lambda model, all=R.writers: all(model)[:-1]
    with mock.patch.object(R, "writers", some), suppress(R.CannotDo), answer(model, r):
        fail_if(not same(logits_of(model, tokenizer), want), "unchecked")
    model, tokenizer = odd_model()
    with answer(model, 3 * r):
        R.check_erased(model, r)


def grade_add(answer):
    model, tokenizer = small_model()
    vector, plain = 5 * randn(32), logits_of(model, tokenizer)
    half = -0.5 * vector
    entering = lambda shift, *layers, start=0: hooked_logits(
        model, tokenizer, R.before, [model.model.layers[layer] for layer in layers],
        lambda x: torch.cat([x[:, :start], x[:, start:] + shift], dim=1))
    for layer in (1, 0):
        with answer(model, vector, layer, coefficient=-0.5):
            got = logits_of(model, tokenizer)
        check(got, entering(half, layer), "the steered model's logits", "example",
              ("no effect", plain), ("unit added", entering(R.unit(-vector) / 2, layer)),
              ("next layer", entering(half, layer + 1)), ("no dose", entering(vector, layer)),
              ("again", entering(half, *range(layer, 4))),
              ("last only", entering(half, layer, start=-1)))
    for what, *wrong in (("layer 4 of 0 .. 3", vector, 4), ("layer -1", vector, -1),
                         ("an infinite coefficient", vector, 1, math.inf),
                         ("a vector of another size", vector[:1], 1)):
        must_raise(what, lambda: answer(model, *wrong).__enter__())
    model, tokenizer = odd_model()
    plain, seen = logits_of(model, tokenizer), []
    with R.reading(model, lambda layer, x: seen.append((x, x.clone()))), answer(model, vector, 1):
        fail_if(same(logits_of(model, tokenizer), plain), "no effect")
    fail_if(not all(torch.equal(x, old) for x, old in seen), "in place")


def grade_log_odds(answer):
    logits, tokens, others = 3 * randn(2, 4, 9), [1, 5], [0, 2, 3, 4, 6, 7, 8]
    p = logits.double().softmax(-1)
    together = p[..., tokens].sum(-1)
    check(answer(logits, tokens), (together / (1 - together)).log().float(), "the score", "example",
          ("log p", together.log()), ("log p", together),
          ("each alone", (p / (1 - p)).log()[..., tokens].sum(-1)),
          ("largest", logits[..., tokens].amax(-1) - logits[..., others].amax(-1)))
    far = torch.tensor([200.0, 0.0, 0.0, -math.inf]) - 30000
    for token, score in ((0, 200 - math.log(2)), (1, -200.0)):
        check(answer(far, [token]), torch.tensor(score), "the score of a very sure model", "unsure")


def grade_kl_divergence(answer):
    p, q = 4 * randn(2, 2, 3, 11)
    q[..., 0] -= 30  # a token that q all but excludes
    logs = lambda x: x.double().log_softmax(-1)
    known = lambda p, q: (logs(p).exp() * (logs(p) - logs(q))).sum(-1).float()
    P, Q, want = p.softmax(-1), q.softmax(-1), known(p, q)
    check(answer(p, q), want, "the divergence", "example",
          ("reversed", known(q, p)), ("not summed", want / 11),
          ("epsilon", (P * ((P + 1e-6) / (Q + 1e-6)).log()).sum(-1)),
          ("unnormalised", (P * (p - q)).sum(-1)))
    far = torch.tensor([[[300.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 300.0]]])
    check(answer(*far), known(*far), "the divergence of logits 300 nats apart", "far apart")
    p, q = p.bfloat16(), q.bfloat16()
    check(answer(p, q), known(p, q), "the divergence of bfloat16 logits", "short")


FATES = """
-3 -1 0 0 0 | .05 0 0 0 0 | .5 9 1 1 1 | (-1, 0) | (-1, 1) mixed (-1, 2) mixed (0, 0) front
1 -1 0 0 -5 / 2 -2 -9 -3 -5 | 0 0 0 0 0 / 0 0 7 0 0 | 1 1 1 1 1 / 1 1 1 -1 1 | (-1, 1) \
   | (-1, 2) broken (-2, 4) late (-1, 4) late (-1, 3) weak
1 -1 0 0 0 / 2 nan -9 -2 0 | 0 0 0 0 0 / 0 nan 7 nan 0 | -1 -1 -1 -1 -1 / -1 nan 1 nan 1 | (-2, 1) \
   | None strict (-1, 2) broken (-1, 4) late (-1, 1) unmeasured (-1, 3) unmeasured
0 -1 2 2 -2 -3 | 0 0 0 0 0 0 | 1 1 1 1 1 1 | (-1, 1) | (-1, 4) late
nan -1 -2 -3 0 | 0 0 0 0 0 | -1 -1 -1 nan -1 | (-1, 2) | (-1, 0) unmeasured (-1, 3) unmeasured
nan -1 -2 -3 0 | 0 0 0 nan 0 | 1 1 1 1 1 | (-1, 2) | (-1, 0) unmeasured (-1, 3) unmeasured
-1 -2 0 0 0 | 0 0 0 0 0 | 1 0 1 1 1 | (-1, 1) | (-1, 0) edge
-1 -2 0 0 0 | 0 .1 0 0 0 | 1 1 1 1 1 | (-1, 1) | (-1, 0) edge
nan nan nan nan nan | nan nan nan nan nan | nan nan nan nan nan | None | (-1, 0) unmeasured
"""  # bypass, KL, induce (/ is the next position), what is right, and what other answers say


def grade_choose(answer):
    for *tables, want, others in rows(FATES):
        scores = {}
        for name, table in zip(("bypass", "kl", "induce"), tables):
            numbers = [list(map(float, line.split())) for line in table.split("/")]
            scores[name] = torch.tensor(numbers, dtype=torch.float64)
        got = str(answer(scores))
        fail_if("tensor" in got, "ints")
        if got != want:
            slip = re.search(rf"{re.escape(got)} (\w+)", others)
            fail(f"chosen: {got}, and {want} is right.", slip and SLIPS[slip[1]])


def grade_erase(answer):
    r, u, w = R.unit(randn(6)), *randn(2, 6, seed=1)
    w = w / (u @ w)
    for *shape, axis in ((6, 6, 0), (6, 4, 0), (5, 6, 1), (6, 0), (3, 4, 6, 2), (3, 6, 4, 1)):
        W, what = randn(*shape, seed=2), f"a weight of shape {tuple(shape)}, axis {axis} writes"
        want = known_erase(W, axis, r, r)
        slips = [("component", W - want), ("moved", want.movedim(axis, -1))]
        if shape == [6, 6]:
            slips.append(("transpose", known_erase(W, 1, r, r)))
        check(answer(W, axis, r, r), want, what, "example", *slips)
        want = known_erase(W, axis, u, w)
        check(answer(W, axis, u, w), want, f"{what}, before a norm", "u and w")


def grade_orthogonalize(answer):
    def fresh():
        model, tokenizer = small_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        for name, p in model.named_parameters():
            if p.ndim == 1:  # the final norm's gain turns some of the head's r onto other axes
                p.copy_(randn(*p.shape, seed=len(name)))
        return model, tokenizer

    def known(which, length=1, untie=True):
        """Edit the parameters of these names, by hand: (logits, names)."""
        model, tokenizer = fresh()
        if untie:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), False)
        edited = {name: p for name, p in model.named_parameters() if re.search(which, name)}
        for name, p in edited.items():
            p.copy_(known_erase(p, int(not re.search("[on]_proj", name)), length * r, length * r))
        return logits_of(model, tokenizer), sorted(edited)

    r, blocks, both = R.unit(randn(32)), "[on]_proj", "embed|[on]_proj"
    model, tokenizer = fresh()
    names, (want, writing) = answer(model, 3 * r), known(both)
    check(logits_of(model, tokenizer), want, "the edited model's logits", "not erased",
          ("left out", known(f"({both}).*weight")[0]), ("left out", known(blocks)[0]),
          ("left out", known(f"{blocks}.weight")[0]), ("head", known(both, untie=False)[0]),
          ("readers", known(f"{both}|_proj.weight")[0]), ("length", known(both, 3)[0]))
    fail_if(not isinstance(names, list) or sorted(map(str, names)) != writing, "names")
    for what, wrong in (("of another size", r[1:]), ("of length 0", 0 * r)):
        must_raise(f"a direction {what}", lambda: answer(model, wrong))
    model, tokenizer = fresh()
    some = lambda model, r, plan=R.plan_edits: dict([*plan(model, r).items()][:-1])
    with mock.patch.object(R, "plan_edits", some), suppress(R.CannotDo):
        answer(model, r)
        fail_if(not same(logits_of(model, tokenizer), want), "unchecked")
    model, tokenizer = odd_model()
    answer(model, 3 * r)
    R.check_erased(model, r)


# Answers that students give: bodies of functions or, with =>, what is changed in the first right
# one that has it.  Before a wrong one stands what must be said: a name in SLIPS, or other words.

RIGHT = r'''
1   tail = common_end([tokenize(tokenizer, [p])["input_ids"][0].tolist() for p in ("Hi", "Why?")])
    if not tail: raise CannotDo("no tail")
    return tail
1   a, b = (tokenize(tokenizer, [p])["input_ids"][0].tolist() for p in ("Hi", "Ha ha"))
    n = next(i for i in range(1, len(a)) if a[-i] != b[-i]) - 1
    if n: return a[-n:]
    raise CannotDo("no tail")
2   n = n_positions or len(template_tail(tokenizer))
    x = activations(model, tokenizer, prompts, list(range(-n, 0))).double()
    return x[:, :, :-1].mean(0)
2   n = n_positions or len(template_tail(tokenizer))
    runs = [model(**tokenize(tokenizer, [p]), output_hidden_states=True) for p in prompts]
    return sum(torch.stack(x.hidden_states[:-1], 2)[0, -n:].double() for x in runs) / len(runs)
3   return torch.sub(harmful_mean, harmless_mean)
3   return -(harmless_mean - harmful_mean)
4a  return (x.float() - (x.float() @ r)[..., None] * r).to(x.dtype)
4a  return (x.double() - (x.double() * r).sum(-1, keepdim=True) * r).to(x.dtype)
4b  r = check_direction(model, direction)
    with hooked(after(m, lambda x: project_out(x, r)) for m in writers(model)):
        check_erased(model, r)
        yield
4b  r, out = check_direction(model, direction), project_out
    hook = lambda m, args, x: (out(x[0], r), *x[1:]) if type(x) is tuple else out(x, r)
    handles = [m.register_forward_hook(hook) for m in writers(model)]
    try:
        check_erased(model, r)
        yield
    finally: [handle.remove() for handle in handles]
5   check_direction(model, vector)
    if not 0 <= layer < len(blocks(model)) or not math.isfinite(coefficient): raise CannotDo("no")
    change = lambda x: x + (coefficient * vector).to(x.dtype)
    with hooked([before(blocks(model)[layer], change)]): yield
5   v = check_direction(model, vector) * vector.norm() * coefficient
    if layer not in range(len(blocks(model))) or not v.isfinite().all(): raise CannotDo("no")
    with before(blocks(model)[layer], lambda x: (x.float() + v).to(x.dtype)): yield
6   others = [i for i in range(logits.shape[-1]) if i not in tokens]
    return logits[..., tokens].logsumexp(-1) - logits[..., others].logsumexp(-1)
6   rest = logits.index_fill(-1, torch.tensor(tokens), -math.inf)
    return logits[..., tokens].logsumexp(-1) - rest.logsumexp(-1)
7   p, q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
7   p, q = (x.double() - x.double().logsumexp(-1, keepdim=True) for x in (p_logits, q_logits))
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).float()
8   b, kl, induce = (scores[name] for name in ("bypass", "kl", "induce"))
    n, L = b.shape
    for floor in (INDUCE_MIN, -math.inf):
        best = [(b[i, l].item(), i - n, l) for i in range(n) for l in range(int(LATE * L))
                if kl[i, l] <= KL_MAX and induce[i, l] >= floor and b[i, l] < math.inf]
        if best: return min(best)[1:]
8   ok = (scores["kl"] <= 0.1) & ~scores["bypass"].isnan() & ~scores["induce"].isnan()
    ok[:, int(0.8 * ok.shape[1]) :] = False
    if (ok & (scores["induce"] >= 0)).any(): ok &= scores["induce"] >= 0
    places = sorted(ok.nonzero().tolist(), key=lambda at: scores["bypass"][at[0], at[1]].item())
    return (places[0][0] - len(ok), places[0][1]) if places else None
9a  along = torch.tensordot(W, u, ([axis], [0])).unsqueeze(axis)
    return W - w.view([-1 if a == axis else 1 for a in range(W.ndim)]) * along
9a  X = W.transpose(axis, -1)
    return (X - (X @ u)[..., None] * w).transpose(axis, -1)
9b  r = check_direction(model, direction)
    untie(model)
    edits = plan_edits(model, r)
    for W, axis, u, w in edits.values(): W.copy_(erase(W.float(), axis, u, w))
    check_erased(model, r)
    return list(edits)
9b  untie(model)
    edits = plan_edits(model, check_direction(model, direction))
    for p, *how in edits.values(): p.data = erase(p.float(), *how).to(p.dtype)
    check_erased(model, unit(direction))
    return [*edits]
'''
RIGHT = re.findall(r"^(\w+) +(.*\n(?:    .*\n)*)", RIGHT, re.MULTILINE)
RIGHT = [(number, body.replace("\n    ", "\n")) for number, body in RIGHT]
WRONG = r'''
1 | generation: tail\n => tail[:2]\n | instruction: "Why?" => "Hi Hi"
1 | backwards: tail\n => tail[::-1]\n | compare what: tail\n => tail[2:]\n
1 | list of token ids: return tail => return 7 | must raise CannotDo: if not tail: => if None:
2 | leaving: :-1] => 1:] | wrong end: -n, 0 => n | layers first: mean(0) => mean(0).movedim(0, 1)
2 | leaving: [:, :, :-1] => | short: .mean(0) => .to(model.dtype).mean(0).double()
2 | a sum: mean(0) => sum(0) | step: run_batches(len, model, tokenize(tokenizer, prompts))
2 | dtype: .double() =>
2 | mean of means: x[:, :, :-1] => torch.stack([y.mean(0) for y in x[:, :, :-1].split(BATCH_SIZE)])
2 | counted twice: x = [0] * 5\ndef see(l, X): x[l] = x[l] + X[:, -2:].double().sum(0)\ndef \
    step(batch):\n  with reading(model, see): return forward(model, batch)\nrun_batches(step, \
    model, tokenize(tokenizer, prompts))\nreturn torch.stack(x[:4], 1) / len(prompts)
3 | harmless first: -(harm => (harm | averaged: harmless_mean) => harmless_mean).mean(0)
3 | too early: return nn.functional.normalize(harmful_mean - harmless_mean, dim=-1)
4a | component: x.float() - ( => ( | short: r = r.to(x.dtype)\nreturn x - (x @ r)[..., None] * r
4a | dtype: .to(x.dtype) =>
4a | mirror: - (x => - 2 * (x | in place: return x.sub_((x @ r)[..., None] * r)
4b | unchecked: check_erased(model, r) => pass | left behind: finally: => except ZeroDivisionError:
4b | no effect: yield => pass\nyield | swallowed: yield => try: yield\n    except Exception: pass
4b | late check: check_erased(model, r)\n    yield => yield\ncheck_erased(model, r)
4b | another size: check_direction(model, direction) => unit(direction) | no yield: yield => pass
4b | length: check_direction(model, direction) => direction\ncheck_erased = print
4b | 'tuple' object: if type(x) is tuple => if 0 | not erased: writers(model) => blocks(model)
4b | blocks: with hooked(before(b, lambda x: project_out(x, unit(direction))) for b in \
    blocks(model)): yield
4b | q and k: (model)) => (model) + sum([[*b.self_attn.children()] for b in blocks(model)], []))
5 | misfit: .to(x.dtype) => | last only: .to(x.dtype) => .to(x.dtype) * torch.eye(x.shape[1])[-1:].T
5 | unit added: * vector) => * unit(vector)) | infinite: or not math.isfinite(coefficient) =>
5 | layer -1: 0 <= layer < => layer < | next layer: before( => after( | in place: x + ( => x.add_(
5 | another size: check_direction(model, vector) => pass | no dose: (coefficient * vector) => vector
5 | again: (blocks(model)[layer], change) => (b, change) for b in blocks(model)[layer:]
5 | f(x[0]): before( => (lambda b, f: b.register_forward_pre_hook(lambda m, x: f(x[0])))(
6 | log p: [..., others] => | largest: .logsumexp(-1) => .amax(-1)
6 | each alone: return torch.logit(logits.softmax(-1)[..., tokens]).sum(-1)
6 | unsure: p = logits.softmax(-1)[..., tokens].sum(-1)\nreturn (p / (1 - p)).log()
7 | reversed: (p.exp() * (p - q)) => (q.exp() * (q - p)) | not summed: .sum(-1) => .mean(-1)
7 | epsilon: p - q => ((p.exp() + 1e-6) / (q.exp() + 1e-6)).log()
7 | unnormalised: p - q => p_logits - q_logits | far apart: p - q => (p.exp() / q.exp()).log()
8 | broken: kl[i, l] <= KL_MAX and => | ints: min(best)[1:] => tuple(torch.tensor(min(best)[1:]))
8 | broken: kl[i, l] => min(floor, 0) or kl[i, l] | weak: (INDUCE_MIN, -math.inf) => (-math.inf,)
8 | late: int(LATE * L) => math.ceil(LATE * L) | mixed: b[i, l].item() => (b - induce)[i, l].item()
8 | edge: >= floor => > floor | front: i - n, l) => i, l) | strict: , -math.inf) => ,)
8 | edge: <= KL_MAX => < KL_MAX | unmeasured: induce[i, l] >= floor => not induce[i, l] < floor
8 | unmeasured: and b[i, l] < math.inf => | unmeasured: kl[i, l] <= KL_MAX => not kl[i, l] > KL_MAX
9a | torch.outer: return W - torch.outer(w, u @ W) | transpose: return W - (W @ u)[..., None] * w
9a | component: W - w => w | u and w: (W, u, => (W, w, | moved: w).transpose(axis, -1) => w)
9a | shape (6,), axis 0: return W - (w[:, None] * (u @ W) if axis == 0 else (W @ u)[..., None] * w)
9b | unchecked: check_erased(model, r) => pass | leaf: for W => with differentiable(model):\n  for W
9b | head: untie(model) => pass | left out: u, w))\ncheck_erased( => u * (W.ndim > 1), w))\nprint(
9b | length: check_direction(model, direction)\nuntie => direction\ncheck_erased = print\nuntie
9b | names: list(edits) => | no gradients: trace_writers(model)
9b | readers: = p => = {n: (p, 1, r, r) for n, p in model.named_parameters() if "j.w" in n} |p
'''
WRONG = [(number, *cell.split(": ", 1)) for number, *cells in rows(WRONG) for cell in cells]


def answered(number, answer, folder):
    """Put an answer in the place of its function, written to a file as students do."""
    name, body = EXERCISES[number], answer.replace("\\n", "\n")
    if "=>" in body:
        old, new = (part.strip(" ") for part in body.split("=>"))
        body = next(right for n, right in RIGHT if n == number and old in right).replace(old, new)
    head, docstring, _ = inspect.getsource(inspect.unwrap(getattr(R, name))).split('"""', 2)
    path = folder / "student.py"
    path.write_text(f'{head}"""{docstring}"""\n{textwrap.indent(body, "    ")}', encoding="utf-8")
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), vars(R), made := {})
    return mock.patch.object(R, name, made[name])


@pytest.mark.parametrize("number, words, answer", WRONG + [(n, "", body) for n, body in RIGHT])
def test_classroom_answers(tmp_path, number, words, answer):
    with answered(number, answer, tmp_path):
        told = grade(number) or ""
    assert SLIPS.get(words, words) in told and bool(words) == bool(told) and told == told.strip()
    assert [slip for slip in SLIPS if SLIPS[slip] in told] in ([words], [])


def test_classroom_every_blank_fails_and_each_can_be_solved_alone(tmp_path):
    write_blank(student := tmp_path / "student.py")
    blanks, text = vars(load(student)), student.read_text(encoding="utf-8")
    old, new = ast.parse(inspect.getsource(R)), ast.parse(text.replace(CHECK, ""))
    for node in old.body + new.body:
        if getattr(node, "name", "") in EXERCISES.values():
            node.body = node.body[:1]  # the docstring: nothing but the bodies differs
    assert ast.dump(old) == ast.dump(new) and text.count(CHECK) == 1
    for number, name in EXERCISES.items():
        with mock.patch.multiple(R, **{x: blanks[x] for x in EXERCISES.values() if x != name}):
            assert not grade(number) and GRADES[number] == "solved"
        with mock.patch.object(R, name, blanks[name]):
            assert grade(number).startswith(f"exercise {number}: {name} is yours to write")
            assert GRADES[number] == "blank"


def test_classroom_commands(tmp_path, capsys):
    blank_5 = "raise NotImplementedError('exercise 5: yours')\nyield"
    with answered("3", "return harmless_mean", tmp_path), answered("5", blank_5, tmp_path):
        status()
    said = capsys.readouterr().out.split("\n")
    assert [line.split()[-1] for line in said[1:6]] == "solved wrong solved solved blank".split()
    assert said[-2] == "next: exercise 3, refusal_directions"
    assert not hint("4a") and not hint("4a", "2") and hint("4a", "9") == hint("4") == 2
    assert re.match("hint 1 of 2: (.|\n)*4a, 4b", "".join(capsys.readouterr()))
    (mine := tmp_path / "mine.py").write_text("precious")
    assert write_blank(mine) == 2 and mine.read_text() == "precious"


@pytest.mark.parametrize("text, words", [
    (None, "student.py is not there: name the file"),
    ("x = (\n", "student.py, line 1: x = (: '(' was never closed"),
    ("\nx = y\n", "student.py, line 2: x = y: NameError: name 'y' is not defined")])
def test_classroom_files_that_cannot_be_loaded(tmp_path, monkeypatch, text, words):
    monkeypatch.setenv("REFUSAL", str(tmp_path / "student.py"))
    if text:
        (tmp_path / "student.py").write_text(text)
    with pytest.raises(pytest.Collector.CollectError) as stop:
        load_graded()
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_classroom_in_a_folder_of_its_own(tmp_path):
    shutil.copytree(R.PROMPTS, tmp_path / "prompts")
    shutil.copy(__file__, tmp_path / "test_refusal.py")
    write_blank(student := tmp_path / "student.py")

    def run(*command, **names):
        env = {name: x for name, x in os.environ.items() if name != "REFUSAL"} | names
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert not re.search("Traceback|^>|^test_refusal.py:", done.stdout, re.MULTILINE)
        return done.stdout.strip()

    pytest_q = "-m", "pytest", "-q", "-p", "no:cacheprovider"
    assert re.fullmatch(r"next: exercise 1: .*exercise_1 \(11 still blank\)", run("student.py"))
    assert "refusal.py is not there" in run(*pytest_q)
    text = student.read_text(encoding="utf-8")
    text = re.sub("raise .*exercise 3:.*", "return harmful_mean - harmless_mean", text)
    student.write_text(text, encoding="utf-8")
    said = run(*pytest_q, REFUSAL="student.py")
    assert said.startswith("graded: student.py\n") and "10 failed, 1 passed" in said
    assert re.findall(r"FAILED .*\[exercise_(\w+?)_", said) == [n for n in EXERCISES if n != "3"]
    assert ANSWERS["3"] in said and ANSWERS["1"] not in said and "next: exercise 1, templ" in said
    shutil.copy(R.__file__, tmp_path / "refusal.py")
    solution = "graded: refusal.py, the solution; for yours, REFUSAL=student.py pytest"
    assert run(*pytest_q, "-k", "exercise_3").startswith(solution)


# %% Every architecture: the census ----------------------------------------------------------------
#
# refusal.py keeps no table of architectures, so it is held to all: a tiny random model of every
# decoder in transformers, with proofs that reading, ablating, adding, orthogonalizing do what they
# say.  `pytest` runs a dozen.  The verdicts: "exact", the edited weights and the hooks are one
# function; "near", a norm writes to the stream, so the weights come r-free but only close (see
# through_norm); "refused", CannotDo, from ablate or only from orthogonalize.  The rest is exact.

VERDICTS = dict.fromkeys("""
afmoe axk1 beam bloom exaone4 flex_olmo gemma2 gemma2-untied gemma3_text gemma4_text gemma4_text-moe
gemma4_unified_text glm4 hyperclovax kolibri1 lfm3 modernbert-decoder nanochat olmo2 olmo3
olmo_hybrid""".split(), "near") | dict.fromkeys((
    "ctrl xglm "  # the positions are fixed waves that no module learns
    "bloom-residual-after-norm doge minimax openai-gpt opt-norm-after opt-projected rwkv zaya "
    "deepseek_v4 gemma3n_text hy_v4 inkling2_text qwen4_exp_text reformer "  # several streams
    "hrm_text inkling2_loop_text dory "  # blocks that are run in a loop
    "gpt_neox_japanese "  # a bias is added by the block itself
    "inkling_text longcat_flash"  # weights only: a writer mixes the channels it is given
    ).split(), "refused")  # and in the second line the stream itself is scaled or normed
DOZEN = ("llama qwen2-tied gpt2 gptj gemma2 mixtral gpt_oss bloom opt olmo2 falcon cohere phi "
         "qwen3_next zaya").split()

# One table of sizes serves all families: whatever a configuration calls a thing, it gets its tiny
# value (4 heads of 16 are not the width; no scale is 1).  Then what a family needs, and variants.
SIZES = """
120: vocab_size vocab_size_per_layer_input 48: hidden_size n_embd d_model 80: intermediate_size
ffn_dim ffn_hidden_size dff dense_intermediate_size 40: moe_intermediate_size
shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
shared_experts_intermediate_size expert_ffn_hidden_size 3: num_hidden_layers n_layer n_layers
num_layers 4: num_attention_heads n_head n_heads num_heads num_experts num_local_experts
n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads linear_num_heads
linear_num_value_heads 2: num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k
top_k_experts n_group n_groups linear_num_key_heads 16: head_dim qk_nope_head_dim indexer_head_dim
linear_head_dim mamba_chunk_size chunk_size 128: max_position_embeddings n_positions
64: sliding_window sliding_window_size attention_window_size local_attention attention_chunk_size
window_size 0: pad_token_id 1: n_shared_experts topk_group first_k_dense_replace 20: q_lora_rank
24: kv_lora_rank index_topk mamba_head_dim 8: qk_rope_head_dim rotary_dim 12: v_head_dim
3.0: embedding_multiplier 0.7: residual_multiplier logit_scale attention_out_multiplier
ssm_out_multiplier 1.5: logits_scaling"""
SIZES = {name: json.loads(size) for size, names in re.findall(r"([\d.]+): (\D+)", SIZES)
         for name in names.split()}
FAMILY = """
bamba attn_layer_indices=[1] | zamba layers_block_type=["hybrid","linear_attention","hybrid"]
cohere_compass_text rope_parameters={"full_attention":{"rope_type":"default","rope_theta":1e4,\
"mrope_section":[4,2,2]},"sliding_attention":{"rope_type":"default","rope_theta":1e4,\
"mrope_section":[4,2,2]}} | lfm2 layer_types=["conv","full_attention","conv"]
dbrx attn_config={"kv_n_heads":2,"rope_theta":10000.0,"clip_qkv":8.0} \
ffn_config={"hidden_size":48,"ffn_hidden_size":80,"moe_num_experts":4,"moe_top_k":2}
dory sliding_window=128 | mellum mlp_layer_types=["dense","sparse","sparse"]
dots3_note_text swa_num_attention_heads=4 swa_num_key_value_heads=4 swa_qk_nope_head_dim=16
falcon_h1 mamba_d_ssm=96 mlp_multipliers=[0.8,1.3] | longcat_flash head_dim=8 | mamba2 head_dim=24
gemma3n_text num_hidden_layers=4 num_kv_shared_layers=2 | jamba attn_layer_offset=1
gpt_neo attention_types=[[["global","local","global"],1]] | zaya num_experts_per_tok=1
gpt_oss intermediate_size=48 | reformer is_decoder=true axial_pos_embds=false hash_seed=0
granitemoehybrid layer_types=["linear_attention","full_attention","linear_attention"]
helium head_dim=12 | nemotron_h layers_block_type=["linear_attention","moe","full_attention","mlp"]
laguna num_attention_heads_per_layer=[4,6,4] | lfm2_moe layer_types=["conv","full_attention","conv"]
minimax_m3_vl_text layer_types=["full_attention","minimax_m3_sparse","full_attention"] \
mlp_layer_types=["dense","sparse","sparse"]
qwen2-sliding layer_types=["full_attention","full_attention","sliding_attention"] \
use_sliding_window=true
qwen4_exp_text indexer_n_heads=2 indexer_kv_heads=1 indexer_budget=64 indexer_compress_ratio=4
stablelm rope_parameters={"rope_type":"default","partial_rotary_factor":0.5} | xlstm hidden_size=128
bloom-residual-after-norm apply_residual_connection_post_layernorm=true | olmo-clipped clip_qkv=0.5
cohere-qk-norm use_qk_norm=true | falcon-alibi-sequential alibi=true parallel_attn=false bias=true
deepseek_v3-no-q-lora q_lora_rank=null | gemma4_text-moe enable_moe_block=true
falcon-multi-head multi_query=false num_kv_heads=4 | gpt_neox-sequential use_parallel_residual=false
falcon-new new_decoder_architecture=true | opt-norm-after do_layer_norm_before=false
falcon-new-one-norm new_decoder_architecture=true num_ln_in_parallel_attn=1
llama-biased attention_bias=true mlp_bias=true | opt-projected-before word_embed_proj_dim=32
mpt-biased no_bias=false | qwen2_moe-mixed mlp_only_layers=[0] | qwen3_moe-mixed mlp_only_layers=[0]
opt-projected do_layer_norm_before=false word_embed_proj_dim=32 | phi-qk-norm qk_layernorm=true
stablelm-parallel use_parallel_residual=true | stablelm-qk-norm qk_layernorm=true use_qkv_bias=true
"""
FAMILY = dict(cell.split(" ", 1) for cell in re.split(r"\n| \| ", FAMILY.strip()))
for name in """gpt_neox-tied gptj-tied granite-tied llama-tied phi-tied qwen2-tied qwen3-tied
cohere-untied gemma-untied gemma2-untied gpt2-untied opt-untied smollm3-untied starcoder2-untied
""".split():
    FAMILY[name] = f"tie_word_embeddings={json.dumps(name.endswith('-tied'))}"
SKIP = """
bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod cpmant xlnet bart
bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper
moss_transcribe_diarize musicgen musicgen_melody fuyu git got_ocr2 dots3_note gemma3 gemma3n gemma4
gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp phi4_multimodal blt gemma4_assistant
gemma4_unified_assistant""".split()  # encoders; halves; other inputs; wrappers of a *_text
NAMES = [name for name in dict.fromkeys([*CAUSAL_LMS, *FAMILY]) if name not in SKIP]
Result = collections.namedtuple("Result", "verdict note gap plain", defaults=("", *[math.nan] * 2))
SEES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=14)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2])


def tiny_of(name):
    """A tiny random float32 model of this family or variant, always the same, or KeyError."""
    family = name if name in CAUSAL_LMS else name.partition("-")[0]
    cls = transformers.CONFIG_MAPPING[family]
    cls = cls.sub_configs.get("text_config", cls)
    default, fields = cls(), cls.__dataclass_fields__.keys()
    given = re.findall(r"(\w+)=(\S+)", f"{FAMILY.get(family)} {FAMILY.get(name)}")
    given = {key: json.loads(value) for key, value in given}  # as a config.json has them
    sizes = {key: SIZES[key] for key in SIZES.keys() & fields}
    if "kv_lora_rank" in sizes:  # latent attention has a key and a value for every head
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for key in fields - SIZES:
        value = getattr(default, key, None)  # a list with an entry a layer: all its kinds of layer
        if isinstance(value, (list, tuple)) and len(value) == default.num_hidden_layers:
            kinds = list(dict.fromkeys(value))
            sizes[key] = [kinds[i % len(kinds)] for i in range(given.get("num_hidden_layers", 3))]
    torch.manual_seed(0)
    model = getattr(transformers, CAUSAL_LMS[family])(cls(**sizes | given))
    randomise(model)
    return model.float().eval().requires_grad_(False)


@torch.no_grad()
def randomise(model):
    """No parameter stays zero or one, and every layer adds as much to the stream as is there."""
    for path, p in model.named_parameters():  # a tied parameter comes once, as the embedding
        module, noise = model.get_submodule(path.rpartition(".")[0]), torch.randn_like(p)
        if re.search(r"A_log|\.D$|dt_|time_", path):  # state spaces take little change
            p.add_(0.1 * noise)
        elif "bias" in path.rpartition(".")[2]:
            p.copy_(0.1 * noise)
        elif p.ndim < 2 or "norm" in type(module).__name__.lower():
            p.add_(0.3 * noise)
        else:
            p.copy_((0.4 if isinstance(module, nn.Embedding) else 0.15) * noise)
    for path, buffer in model.state_dict().items():
        if re.search(r"(correction|expert)_bias$|balancing_biases$|layer_scalar$", path):  # learned
            buffer.add_(0.1 * torch.randn_like(buffer))


class Sums(TorchDispatchMode):
    """Follows the stream through forward passes, and finds the most of r in it: max |x.r| / |x|.

    It knows only memory: what enters block 0 is the stream, so is every view, cast or scaled copy,
    and all that is added to it.  What enters a later block must have been reached in this way.
    """

    SAME = {"_to_copy", "clone", "copy_", "add", "add_", "mul", "mul_", "div", "div_"}

    def __init__(self, model, r, inputs):
        super().__init__()
        self.r, self.left, self.sums, self.memory = r, 0.0, 0, {}
        with R.reading(model, self.see):
            for ids in inputs:
                with self:
                    model(ids)
        assert self.sums >= len(inputs) * len(R.blocks(model)), "some block added nothing"

    def see(self, layer, x):
        assert layer == 0 or self.follows(x), f"block {layer} reads no sum that holds the stream"
        self.follow(x)

    def follow(self, x):
        self.memory[x.untyped_storage().data_ptr()] = x  # kept, so the address is not used again
        left = (x.float() @ self.r).abs() / x.float().norm(dim=-1)
        self.left = max(self.left, left.max().item())

    def follows(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in self.SAME and any(map(self.follows, args)) and out.shape[-1:] == self.r.shape:
            scales = any(not isinstance(x, torch.Tensor) or x.numel() == 1 for x in args)
            if name[:3] not in ("mul", "div") or scales:
                self.follow(out)
                self.sums += name.startswith("add")
        return out


def apart(a, b):
    """The greatest difference of two lists of logits, relative to the greatest (where above 1)."""
    return max((x - y).abs().max().item() / max(1, y.abs().max().item()) for x, y in zip(a, b))


@torch.no_grad()
def check_padding(model):
    """Rows of a left-padded batch, read and measured, against each row alone, with nothing said."""
    ids, lengths = torch.randint(3, 100, (3, 9)), torch.tensor([9, 5, 7])
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()

    def measure(batch, logits=lambda batch: R.forward(model, batch)):
        seen = []
        with R.reading(model, lambda layer, x: seen.append(x[:, -1])):
            seen.append(logits(batch)[:, -1])
        return torch.cat([x for x in seen if x.ndim == 2], dim=1)  # one stream or none

    together = R.run_batches(measure, model, {"input_ids": ids * mask, "attention_mask": mask})
    for row, n, got in zip(ids, lengths, together):
        alone = measure(row[None, -n:], lambda ids: model(input_ids=ids).logits)
        assert apart([got], alone) < 1e-4, "padding changes what is measured"


@torch.no_grad()
def prove(model):
    """Every claim of sections 3, 5 and 8, for one model: AssertionError, or its verdict."""
    r, note = R.unit(randn(model.config.get_text_config(decoder=True).hidden_size)), ""
    inputs = [torch.randint(3, 100, shape) for shape in ((2, 9), (1, 72))]
    logits = lambda: [model(ids).logits for ids in inputs]  # 72: past a sliding window of 64
    greedy = lambda cache: model.generate(
        inputs[1], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache).tolist()
    distance = lambda x, y: ((x - y).norm(dim=-1) / y.norm(dim=-1)).flatten()
    gap = lambda a: torch.cat([*map(distance, a, ablated)]).median().item()  # of the typical token
    base = logits()
    try:
        with R.ablate(model, 3 * r):
            assert Sums(model, r, inputs).left < 1e-4, "ablate leaves r in the stream"
            ablated, odd = logits(), greedy(True) != greedy(False)
    except R.CannotDo as refusal:
        note = str(refusal)
    assert all(map(torch.equal, logits(), base)), "ablate leaves something behind"
    if "no list" not in note:  # else there are no layers to read
        check_padding(model)
    if note:
        return Result("refused", note)
    assert apart(ablated, base) > 1e-3, "ablate does nothing"
    assert not odd or greedy(True) != greedy(False), "a cache changes replies only when ablated"
    before = R.probe(model)
    for layer in (0, len(before) - 2):  # the first and the last
        with R.add(model, 5 * r, layer, -0.3):
            after = R.probe(model)
        assert torch.equal(after[layer], before[layer] - 0.3 * (5 * r)), "add adds something else"
        assert all(map(torch.equal, after[:layer], before[:layer])), "add comes too early"
        assert not torch.equal(after[-1], before[-1]), "add does nothing"
    assert all(map(torch.equal, logits(), base)), "add leaves something behind"
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        edits, edited = R.plan_edits(model, r), R.orthogonalize(model, 3 * r)
    except R.CannotDo as refusal:
        return Result("refused", f"weights only: {refusal}")
    assert Sums(model, r, inputs).left < 1e-4, "orthogonalize leaves r in the stream"
    new, orthogonal = model.state_dict(), logits()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert new.keys() == old.keys() and set(edited) == changed, f"listed {edited}: {changed}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    saved = [again(ids).logits for ids in inputs]
    assert apart(saved, orthogonal) < 1e-5, "what is saved is another model"
    embedding = again.get_input_embeddings().weight
    assert again.get_output_embeddings().weight is not embedding, "the saved head is tied again"
    note = "sees padding" * R.padding_is_seen(model)
    if apart(orthogonal, ablated) <= 1e-4:
        return Result("exact", note, apart(orthogonal, ablated))
    for name, (p, axis, *_) in edits.items():  # a norm writes: near, and nearer than with r alone
        p.copy_(known_erase(old[name], axis, r, r))
    ours, plain = gap(orthogonal), gap(logits())
    result, no_gain = Result("near", note, ours, plain), math.isclose(ours, plain, rel_tol=1e-3)
    assert ours < 0.05 and (ours < plain / 3 or no_gain), result
    return result


@census_mark
@pytest.mark.parametrize("architecture", NAMES if "census" in sys.argv else DOZEN)
def test_architecture(architecture):
    try:
        model = tiny_of(architecture)
    except KeyError:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    result = prove(model)
    assert result.verdict == VERDICTS.get(architecture, "exact"), result
    assert result.verdict != "refused" or re.search("block|embedding|writes", result.note), result


@pytest.mark.parametrize("name, text, change, sees, verdict", [  # as many other blocks come first
    ("Gemma3", "gemma3_text", {}, SEES, "near"),
    ("Llava", "llama", {}, SEES | {"model_type": "clip_vision_model"}, "exact"),
    ("Qwen2VL", "qwen2", dict(model_type="qwen2_vl_text", rope_parameters=MROPE),
     dict(depth=3, embed_dim=32, hidden_size=48, num_heads=2, patch_size=14), "exact")])
def test_a_chat_model_inside_a_vision_model(name, text, change, sees, verdict):
    config = getattr(transformers, f"{name}Config")(
        text_config=tiny_of(text).config.to_dict() | change, vision_config=sees, image_token_id=101)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    randomise(model.requires_grad_(False))
    assert prove(model).verdict == verdict


def census(*names):
    """Print family | verdict | logit gap | note for every family (or those named)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started, count, wrong = time.time(), collections.Counter(), 0
    print(f"{'family':<28}{'verdict':<10}{'gap':<9}{'r alone':<9}note")
    for name in names or NAMES:
        try:
            verdict, note, gap, plain = prove(tiny_of(name))
        except Exception as error:
            verdict, note, gap, plain = Result("WRONG", f"{type(error).__name__}: {error}")
        if verdict != VERDICTS.get(name, "exact"):
            wrong, note = 1, f"EXPECTED {VERDICTS.get(name, 'exact')}! {note}"
        count[verdict] += 1
        print(f"{name:<28}{verdict:<10}{gap:<9.1e}{plain:<9.1e}{note}", flush=True)
    print(*(f"{n} {kind}" for kind, n in count.items()), f"{time.time() - started:.0f} s", sep=", ")
    return wrong


# %% python test_refusal.py bench [--model FOLDER]: what the search costs --------------------------


def timed(model, work):
    """Run work(): (seconds, rows and tokens that entered the first block), and the result."""
    shapes, start = [], time.perf_counter()
    see = lambda module, args: shapes.append(args[0].shape[:2])
    with R.blocks(model)[0].register_forward_pre_hook(see):
        result = work()
    rows, tokens = sum(shape[0] for shape in shapes), sum(shape.numel() for shape in shapes)
    return torch.tensor([time.perf_counter() - start, rows, tokens]), result


def bench(flag="--model", folder="tiny"):
    """The cost of refusal.py's search beside that of the plain procedure, on the same prompts."""
    model, tokenizer = tools = R.load_model(folder)
    data = split_of(40, 8, 1)
    R.writers(model), R.padding_is_seen(model)  # found once a model
    train, val = ([getattr(data[kind], part) for kind in KINDS] for part in ("train", "val"))
    means, pair = timed(model, lambda: [R.mean_activations(*tools, prompts) for prompts in train])
    r = R.refusal_directions(*pair)
    search, chosen = timed(model, lambda: R.select_direction(*tools, r, *val))
    some = [(i, layer) for i in range(len(r)) for layer in range(r.shape[1])]
    best, places = (chosen.position, chosen.layer), len(some)
    if folder != "tiny":  # the winner, and three of the others
        some = [best, *some[places // 6 :: places // 3]]
    plain, _ = timed(model, lambda: [plain_means(*tools, prompts) for prompts in train])
    sweeps, (scores, winner) = timed(model, lambda: plain_select(*tools, r, *val, only=some))
    plain, ours = plain + sweeps * places / len(some), means + search
    print(f"{folder}: {model.dtype}, 40 + 8 prompts of each kind; the plain procedure's sweep over "
          f"{len(some)} of {places} candidates, extrapolated to all")
    print(f"winner {best}; of those that the plain procedure swept: {winner}")
    print(f"{'':<12}{'seconds':>10}{'rows':>10}{'tokens':>10}")
    for name, row in (("plain", plain), ("refusal.py", ours), ("times", plain / ours)):
        print(f"{name:<12}" + "".join(f"{x:>10.1f}" for x in row.tolist()))
    for name, table in scores.items():
        gaps = (chosen.scores[name] - table).abs()
        print(f"{name}: {gaps.isfinite().sum()} by both, {gaps.nan_to_num().max():.0e} apart")


if "REFUSAL" in os.environ:  # grading a student: nothing but the exercises
    for name in [name for name in globals() if re.match("test_(?!exercise)", name)]:
        del globals()[name]

if PROGRAM:
    usage = ("python test_refusal.py blank FILE | status [FILE] | hint EXERCISE [NUMBER] | census "
             "[NAME ...] | bench [--model FOLDER]")
    tools = dict(blank=write_blank, hint=hint, status=status, census=census, bench=bench)
    tool, *rest = [*sys.argv[1:], ""]
    known = tool in tools and (tool not in ("blank", "hint") or rest[0])
    sys.exit(tools[tool](*rest[:-1]) if known else f"usage: {usage}")
