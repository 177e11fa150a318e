"""Hugging Face transformers: attn_implementation="fastdl" against its own, on tiny random models."""

import copy
import pickle

import pytest
import torch

import fastdl
from fastdl import _C
from fastdl.ops import calls

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

import fastdl.integrations.transformers as integration  # noqa: E402

VOCABULARY, L = 40, 9
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **COMMON
    )
    return transformers.BertModel(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        **COMMON,
    )
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=3,
        max_position_embeddings=64,
        **COMMON,
    )
    return transformers.MistralForCausalLM(config)


def gemma2():
    config = transformers.Gemma2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        head_dim=8,
        sliding_window=3,
        attn_logit_softcapping=2.0,
        max_position_embeddings=64,
        **COMMON,
    )
    return transformers.Gemma2ForCausalLM(config)


def whisper():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=40,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **COMMON,
    )
    return transformers.WhisperForConditionalGeneration(config)


DECODERS = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "gemma2": gemma2}


def pair(make, implementation="eager"):
    """(fastdl's, torch's) in eval mode, of the same weights."""
    torch.manual_seed(3)
    theirs = make().eval()
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation(implementation)
    ours.set_attn_implementation("fastdl")
    return fastdl.optimize(ours), theirs


def attention_kernels():
    """Names of the attention kernels that ran since this was last asked."""
    names = {name for name, count in _C.counters().items() if count and name.startswith("attention")}
    _C.reset_counters()
    return names


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()
    attention_kernels()


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (2, L), generator=torch.Generator().manual_seed(5))


PADDING = torch.tensor([[1] * L, [0] * 3 + [1] * (L - 3)])


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_bert(padded, tokens):
    ours, theirs = pair(bert)
    mask = PADDING.flip(-1) if padded else None
    out = ours(tokens, attention_mask=mask).last_hidden_state
    assert attention_kernels()
    torch.testing.assert_close(out, theirs(tokens, attention_mask=mask).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not calls.handbacks


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, padded, tokens):
    ours, theirs = pair(DECODERS[name])
    mask = PADDING if padded else None
    out, expected = ours(tokens, attention_mask=mask).logits, theirs(tokens, attention_mask=mask).logits
    assert attention_kernels()
    seen = PADDING.bool() if padded else slice(None)
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert not calls.handbacks


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_generate_gives_the_same_tokens(name, tokens):
    ours, theirs = pair(DECODERS[name])
    for options in ({}, {"attention_mask": PADDING}, {"cache_implementation": "static", "disable_compile": True}):
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
        assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))
        assert attention_kernels()


def test_gradients(tokens):
    for make in (gpt2, llama):
        ours, theirs = pair(make, "sdpa")
        losses = [model(tokens, labels=tokens).loss for model in (ours, theirs)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert not calls.handbacks


def test_dropout_in_training_is_reproducible(tokens):
    model = pair(gpt2)[0].train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(tokens, labels=tokens).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_whisper():
    ours, theirs = pair(whisper)
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(6))
    decoder = torch.tensor([[1, 5, 6], [1, 7, 8]])
    out = ours(features, decoder_input_ids=decoder).logits
    assert attention_kernels()
    torch.testing.assert_close(out, theirs(features, decoder_input_ids=decoder).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1}
    assert torch.equal(ours.generate(features, **options), theirs.generate(features, **options))
    assert not calls.handbacks


def test_conv1d(tokens):
    model = fastdl.optimize(gpt2().eval())
    layer = model.transformer.h[0].attn.c_attn
    assert type(layer) is integration.Conv1D and isinstance(layer, transformers.pytorch_utils.Conv1D)
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(layer(x), layer.torch_forward(x))
    grads = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(layer.torch_forward(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)
    assert type(pickle.loads(pickle.dumps(layer))) is transformers.pytorch_utils.Conv1D
    with pytest.warns(UserWarning, match=r"its weight is \[in, out\]"):
        fastdl.freeze(model)
    assert type(fastdl.restore(model).transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D


def test_explain_shows_the_attention(tokens):
    rows = fastdl.explain(pair(llama)[0], tokens).rows
    (row,) = {row.type for row in rows if "scaled_dot_product_attention" in row.type}
    assert row == "LlamaAttention: functional.scaled_dot_product_attention"
    assert {r.status for r in rows} == {"fastdl"}


def test_compile(tokens):
    torch._dynamo.reset()
    ours, _ = pair(llama)
    expected = ours(tokens).logits
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_position_bias_and_what_is_refused():
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, 5), (2, 6), (2, 6)))
    bias, seen = torch.randn(1, 4, 5, 6), torch.rand(2, 1, 5, 6) < 0.7
    seen[..., 0] = True
    module = torch.nn.Module()
    attend, torchs = integration.attention_forward, torch.nn.functional.scaled_dot_product_attention
    out, _ = attend(module, q, k, v, seen, position_bias=bias, is_causal=True)
    expected = torchs(q, k, v, bias.masked_fill(~seen, -torch.inf), enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    out, _ = attend(module, q, k, v, None, position_bias=bias)
    causal = torch.ones(5, 6, dtype=torch.bool).tril()
    expected = torchs(q, k, v, bias.masked_fill(~causal, -torch.inf), enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="'s_aux'"):
        attend(module, q, k, v, None, s_aux=torch.zeros(4))


def test_nothing_is_imported_for_its_sake(run_python):
    out = run_python(
        "-c",
        "import sys, fastdl, torch; fastdl.optimize(torch.nn.Linear(2, 2)); print('transformers' in sys.modules)",
    )
    assert out.strip() == "False"


def test_importing_transformers_first_registers(run_python):
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import transformers.modeling_utils, fastdl\n"
        "print('fastdl' in transformers.AttentionInterface(), 'fastdl' in transformers.AttentionMaskInterface())"
    )
    assert run_python("-c", code).split() == ["True", "True"]
