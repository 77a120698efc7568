"""Where param_groups() puts the parameters of known models, and what it refuses to guess."""

import re
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import train_gpt
from aurora.config import load_config
from aurora.optim import param_groups
from tests.conftest import ROOT
from tests.test_docs import blocks


def check(model, expected, **arguments):
    """expected: a line "PATTERN GROUP OPTION..." for each kind of parameter; "PATTERN frozen" is in no group.

    Of several patterns that match a name, the first counts.
    """
    groups = param_groups(model, **arguments)
    lines = [line.split() for line in expected.strip().splitlines()]
    used = set()
    where = {name: group for group in groups for name, _ in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(where) == len(groups.rows)
    for name, p in model.named_parameters():
        pattern, kind, *options = next(line for line in lines if fnmatchcase(name, line[0]))
        used.add(pattern)
        assert p.requires_grad == (kind != "frozen"), name
        if kind == "frozen":
            assert name not in where
            continue
        group = where[name]
        assert any(held is p for _, held in group["params"]), name
        is_matrix = kind in ("matrix", "conv", "experts")
        keys = ("view", "layout", "split") if is_matrix else ()
        found = [f"{key}={group[key]}".replace(" ", "") for key in keys if key in group]
        assert (group["name"], sorted(found)) == (kind, sorted(options)), name
        assert group.get("algorithm") == (None if is_matrix else "adamw"), name
        assert is_matrix or {"lr", "betas", "eps", "weight_decay"} <= group.keys()
    assert used == {line[0] for line in lines}
    return groups


def part_of(package, cls):
    """The class as if it were one of another package."""
    cls.__module__ = f"{package}.models"
    return cls


# ---- layers of torch ----


def test_trainers_own_model_has_the_roles_it_states():
    model = train_gpt.GPT(load_config(ROOT / "configs" / "quick.toml", "muon").model)
    named = {"embed": "embedding"}
    roles = "\n".join(f"{name} {named.get(role, role)}" for name, _, role in model.roles())
    check(model, roles)


def test_torchs_transformer():
    check(nn.Transformer(16, 2, 2, 2, 24), """
        *.in_proj_weight matrix split=(16,16,16)
        *.out_proj.weight matrix
        *.linear?.weight matrix
        * vector
    """)  # fmt: skip


def test_attention_with_other_widths():
    check(nn.MultiheadAttention(16, 2, kdim=8, vdim=4, add_bias_kv=True), """
        ?_proj_weight matrix
        out_proj.weight matrix
        * vector
    """)  # fmt: skip


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv1d(8, 16, 3, groups=2),
        nn.Conv3d(16, 3, 1, groups=1),
        nn.ConvTranspose2d(3, 6, 4),
        nn.ConvTranspose2d(6, 6, 4, groups=2),
        nn.Conv2d(4, 1, 1),
        nn.GroupNorm(2, 6),
        nn.LayerNorm((6, 5, 5)),
        nn.Flatten(),
        nn.Linear(150, 10),
    )
    groups = check(model, """
        0.weight conv view=conv
        1.weight vector
        2.weight conv view=conv split=(8,8)
        3.weight conv view=conv
        4.weight conv view=conv layout=in_out
        5.weight adamw
        10.weight head
        * vector
    """)  # fmt: skip
    assert re.search(r"^1\.weight .* vector .* depthwise convolution", str(groups), re.MULTILINE)


def test_recurrent_layers():
    check(nn.ModuleList([nn.LSTM(8, 6, proj_size=4), nn.GRUCell(8, 6), nn.RNN(8, 6)]), """
        0.weight_hr_l0 matrix
        0.weight* matrix split=(6,6,6,6)
        1.weight* matrix split=(6,6,6)
        2.weight* matrix
        * vector
    """)  # fmt: skip


def test_thin_and_empty_weights_are_no_matrices():
    model = nn.ModuleList([nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(0, 4), nn.Linear(8, 8)])
    check(model, "3.weight matrix\n* vector")


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    check(model, "0.* frozen\n1.weight head\n1.bias vector")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter that requires a gradient"):
        param_groups(model)


def test_complex_weights_go_to_adamw():
    groups = check(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), "*weight adamw\n*bias vector")
    assert "torch.complex64: matrices must be real" in str(groups)


# ---- heads ----


class Language(nn.Module):
    def __init__(self, vocab=50, width=16, positions=32, tied=False, head=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.score = nn.Linear(width, vocab, bias=False) if head else None
        if tied:
            self.score.weight = self.tokens.weight


def test_a_head_has_an_output_for_every_entry_of_an_embedding():
    check(Language(), "tokens* embedding\npositions* embedding\n*bias vector\nscore* head\n* matrix")
    check(Language(positions=16), "tokens* embedding\npositions* embedding\n*bias vector\nscore* head\n* matrix")


def test_a_tied_head_is_an_embedding_once():
    groups = check(Language(tied=True), "tokens* embedding\npositions* embedding\n*bias vector\n* matrix")
    assert re.search("^tokens.weight .* Embedding . Linear .* tied to the head$", str(groups), re.MULTILINE)
    check(Language(tied=True, positions=16), "tokens* embedding\npositions* embedding\n*bias vector\n* matrix")
    check(Language(tied=True), "tokens* adamw\npositions* embedding\n*bias vector\n* matrix",
          overrides={"score.weight": "adamw"})  # fmt: skip


def test_a_head_is_not_guessed_among_layers_of_one_width():
    model = Language(vocab=16)
    with pytest.raises(ValueError, match=r'blocks.0.weight, .*score.weight is the output head.* head="score.weight"'):
        param_groups(model)
    expected = "tokens* embedding\npositions* embedding\n*bias vector\nscore* {}\n* matrix"
    check(model, expected.format("head"), head="score.weight")
    check(model, expected.format("head"), overrides={"score.weight": "head"})
    check(model, expected.format("matrix"), head=None)


def test_the_last_layer_is_a_head_if_none_takes_its_outputs():
    check(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), "0.weight matrix\n1.weight head\n* vector")
    groups = check(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), "*weight matrix\n* vector")
    assert str(groups).endswith('If there is one: param_groups(model, head="NAME.weight").')
    assert not param_groups(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), head=None).note


# ---- what is not known, and overrides ----


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gain = nn.Parameter(torch.ones(4, 6, 8)), nn.Parameter(torch.ones(8))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts(), "proj": nn.Linear(8, 8)}) for _ in range(2)])
        self.A_log = nn.Parameter(torch.ones(8, 2))


def test_all_that_is_not_known_is_named_with_what_to_pass():
    with pytest.raises(ValueError) as caught:
        param_groups(Mixer())
    message = str(caught.value)
    assert "    layers.*.experts.up  (4, 6, 8)  of Experts  x 2\n" in message and "A_log  (8, 2)  of Mixer" in message
    (shown,) = re.findall(r"^overrides=(\{.*?^\})", message, re.MULTILINE | re.DOTALL)
    overrides = eval(shown)
    assert overrides == {"A_log": "matrix", "layers.*.experts.up": {"view": "experts"}}
    check(Mixer(), "A_log matrix\n*.up experts view=experts\n*.proj.weight matrix\n* vector", overrides=overrides)


def test_a_pattern_that_would_match_more_is_not_proposed():
    model = nn.Sequential(Experts(), nn.Linear(6, 6), Experts())
    model.up = nn.Parameter(torch.ones(3, 5))
    with pytest.raises(ValueError) as caught:
        param_groups(model)
    (shown,) = re.findall(r"^overrides=(\{.*?^\})", str(caught.value), re.MULTILINE | re.DOTALL)
    check(
        model,
        "up matrix\n0.up experts view=experts\n2.up experts view=experts\n1.weight matrix\n* vector",
        overrides=eval(shown),
        head=None,
    )


def test_overrides():
    groups = check(
        Mixer(),
        "A_log adamw\n*.up experts view=experts layout=in_out split=(2,6)\n*.proj.weight matrix\n* vector",
        overrides={
            "experts.up": dict(view="experts", layout="in_out", split=[2, 6]),
            "A_log": dict(algorithm="adamw", lr=1e-3),
            "1.proj.weight": dict(lr=0.5),
            "*": dict(weight_decay=0.25),
        },
        lr=0.1,
    )
    settings = {name: (group["lr"], group.get("weight_decay")) for group in groups for name, _ in group["params"]}
    assert settings["layers.0.experts.up"] == (0.1, None) and settings["A_log"] == (1e-3, 0.0)
    assert settings["layers.0.proj.weight"] == (0.1, 0.25) and settings["layers.1.proj.weight"] == (0.5, None)
    assert settings["layers.1.proj.bias"] == (3e-4, 0.25)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"A_lag": "adamw"}, r"'A_lag' matches no parameter of the model; did you mean A_log\?"),
        ({"experts.down": "adamw"}, r"did you mean experts.gain or experts.up"),
        ({"A_log": "matrices"}, "is 'matrices'; a group is one of matrix, conv"),
        ({"A_log": "experts"}, r"A_log of shape \(8, 2\) and dtype torch.float32 cannot be seen as experts"),
        ({"*.gain": "matrix"}, r"layers.0.experts.gain of shape \(8,\)"),
        ({"*.up": dict(view="expert")}, "view is 'expert'"),
        ({"*.up": dict(view="experts", split=(4, 4))}, r"split \(4, 4\) of layers.0.experts.up .* its 6 outputs"),
        ({"A_log": dict(split=(8, 0))}, "sum to its 8 outputs"),
        ({"A_log": dict(algorithm="sgd")}, "it is adamw, or absent"),
        ({"A_log": dict(params=[])}, "params and name may not be"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        param_groups(Mixer(), overrides=overrides)


def test_layers_that_disagree_on_a_shared_weight_are_not_known():
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(6, 6, 1))
    model[0].weight = nn.Parameter(torch.ones(6, 6, 1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0.weight  \(6, 6, 1\)  of Linear \+ Conv1d"):
        param_groups(model, head=None)


def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match="0.weight, 0.bias have no shape yet: run the model once"):
        param_groups(nn.Sequential(nn.LazyLinear(4)))


def test_flattened_weights_are_refused():
    wrapper = part_of("torch", type("FullyShardedDataParallel", (nn.Sequential,), {}))
    with pytest.raises(ValueError, match="matrices no longer: use DistributedDataParallel"):
        param_groups(nn.Sequential(wrapper(nn.Linear(4, 4))))


# ---- the groups ----


def test_settings_of_the_groups():
    groups = param_groups(Language(), lr=0.02, weight_decay=0.1, adamw_lr=1e-3, adamw_weight_decay=0.5, head_lr=2e-3)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {"matrix": (0.02, 0.1), "embedding": (1e-3, 0.5), "head": (2e-3, 0.5), "vector": (1e-3, 0.0)}
    assert [group["name"] for group in groups] == ["matrix", "embedding", "head", "vector"]
    assert not {"lr", "weight_decay"} & param_groups(Language())[0].keys()


def test_table_survives_the_optimizer():
    groups = param_groups(Language())
    table = str(groups)
    optimizer = AdamW(groups)
    assert optimizer.param_groups[0]["param_names"] == ["blocks.0.weight", "blocks.1.weight"]
    assert str(groups) == table and re.search(
        r"^blocks\.\*\.weight +2 +\(16, 16\) +Linear +matrix", table, re.MULTILINE
    )


def test_compiled_models_keep_the_names_they_have():
    model = torch.compile(Language())
    expected = "_orig_mod.score* head\n_orig_mod.blocks.*.weight matrix\n*.bias vector\n* embedding"
    check(model, expected)
    check(model, expected, overrides={"blocks.*.weight": "matrix"})


def test_snippet_of_the_page_prints_its_table(capsys):
    (block,) = (block for block in blocks("aurora/optim/README.md", "python") if "print(groups)" in block)
    exec(block.replace("aurora_optim", "aurora.optim"), {})
    groups = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert " head " in groups["3.weight"] and " matrix " in groups["1.weight"] and " embedding " in groups["0.weight"]


# ---- layers of transformers: stand-ins, then the models themselves ----


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.ones(nf))


class GPT2Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(24, 8), Conv1D(8, 8)


class Phi3Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(8, 20, bias=False), nn.Linear(12, 8, bias=False)


class MoeExperts(nn.Module):
    def __init__(self, is_transposed, is_concatenated):
        super().__init__()
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 8, 6)), nn.Parameter(torch.ones(4, 3, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.ones(4, 8))


for stand_in in (Conv1D, GPT2Attention, Phi3Attention, MoeExperts):
    part_of("transformers", stand_in)


def test_layers_of_transformers():
    layers = [GPT2Attention(), Phi3Attention(), MoeExperts(False, True), MoeExperts(True, False)]
    expected = """
        0.c_attn.weight matrix layout=in_out split=(8,8,8)
        0.c_proj.weight matrix layout=in_out
        1.qkv_proj.weight matrix split=(12,4,4)
        1.o_proj.weight matrix
        2.gate_up_proj experts view=experts split=(4,4)
        2.down_proj experts view=experts
        3.gate_up_proj experts view=experts layout=in_out
        3.down_proj experts view=experts layout=in_out
        * vector
    """
    check(nn.ModuleList(layers), expected)
    check(nn.ModuleList(layers), re.sub(" split=.*", "", expected), split_fused=False)


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        dict(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=32),
        """
        *.wte.weight embedding
        *.wpe.weight embedding
        *.c_attn.weight matrix layout=in_out split=(32,32,32)
        *.c_proj.weight matrix layout=in_out
        *.c_fc.weight matrix layout=in_out
        * vector
        """,
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        SMALL | dict(num_key_value_heads=2, vocab_size=32),
        """
        model.embed_tokens.weight embedding
        lm_head.weight head
        *_proj.weight matrix
        * vector
        """,
    ),
    "LlamaForSequenceClassification": (
        "LlamaConfig",
        SMALL | dict(num_key_value_heads=2, vocab_size=101, num_labels=5),
        """
        model.embed_tokens.weight embedding
        score.weight head
        *_proj.weight matrix
        * vector
        """,
    ),
    "MixtralForCausalLM": (
        "MixtralConfig",
        SMALL | dict(num_key_value_heads=2, vocab_size=101, num_local_experts=4),
        """
        model.embed_tokens.weight embedding
        lm_head.weight head
        *_proj.weight matrix
        *.mlp.gate.weight matrix
        *.gate_up_proj experts view=experts split=(48,48)
        *.down_proj experts view=experts
        * vector
        """,
    ),
    "Phi3ForCausalLM": (
        "Phi3Config",
        SMALL | dict(num_key_value_heads=2, vocab_size=101, pad_token_id=0),
        """
        model.embed_tokens.weight embedding
        lm_head.weight head
        *.qkv_proj.weight matrix split=(32,16,16)
        *.gate_up_proj.weight matrix split=(48,48)
        *_proj.weight matrix
        * vector
        """,
    ),
    "GPTNeoXForCausalLM": (
        "GPTNeoXConfig",
        SMALL | dict(vocab_size=101),
        """
        *.embed_in.weight embedding
        *head.weight head
        *norm.weight vector
        *.weight matrix
        * vector
        """,
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        dict(hidden_size=32, num_hidden_layers=2, vocab_size=101, state_size=4),
        """
        backbone.embeddings.weight embedding
        *.A_log vector
        *.conv1d.weight vector
        *.in_proj.weight matrix split=(64,64)
        *_proj.weight matrix
        * vector
        """,
    ),
    "ViTForImageClassification": (
        "ViTConfig",
        SMALL | dict(image_size=16, patch_size=4, num_labels=10),
        """
        *.position_embeddings embedding
        *.patch_embeddings.projection.weight conv view=conv
        *layernorm*.weight vector
        classifier.weight head
        *.weight matrix
        * vector
        """,
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10),
        """
        *.convolution.weight conv view=conv
        classifier.1.weight head
        * vector
        """,
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
        """
        model.encoder.embed_positions.weight frozen
        *.embed_*.weight embedding
        *.conv?.weight conv view=conv
        *_norm.weight vector
        *.weight matrix
        * vector
        """,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    config, settings, expected = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    check(model, expected)


@pytest.mark.slow
def test_a_model_of_transformers_inside_another():
    transformers = pytest.importorskip("transformers")
    _, settings, expected = MODELS["LlamaForCausalLM"]
    backbone = transformers.LlamaModel(transformers.LlamaConfig(**settings))
    model = nn.ModuleDict({"backbone": backbone, "classes": nn.Linear(32, 7)})
    check(model, """
        classes.weight head
        *.embed_tokens.weight embedding
        *_proj.weight matrix
        * vector
    """)  # fmt: skip
    groups = check(backbone, "embed_tokens.weight embedding\n*_proj.weight matrix\n* vector")
    assert groups.note
