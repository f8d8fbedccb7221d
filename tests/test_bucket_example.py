"""The autobucketing guide's BERT example, natively compiled in workers; and what its buckets share.

A small random BERT stands for the one to download, buckets of 16 and 32 for those of 128 and 512.
"""

import copy
import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest
import torch
from bucket_helpers import subgraphs, tensor_of
from helpers import run_python, save
from trace_helpers import loaded, saved_bytes

import neuron_ext as torch_neuronx
from neuron_ext.buckets.job import Job, compile_bucket
from neuron_ext.buckets.shared_weights import share_weights

VOCABULARY = 60


def encode(words, max_length, batch_size=1):
    """Token ids and a mask, padded to ``max_length``."""
    ids = torch.tensor([words + [0] * (max_length - len(words))])
    mask = (torch.arange(max_length) < len(words)).long().unsqueeze(0)
    return (
        torch.repeat_interleave(ids, batch_size, 0),
        torch.repeat_interleave(mask, batch_size, 0),
    )


def get_bert_model(*args):
    from transformers import BertConfig, BertForSequenceClassification

    shape = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        return_dict=False,
    )
    model = BertForSequenceClassification(shape).eval()
    return model, {}


def sequence_length_bucket_kernel(tensor_list: list[torch.Tensor]):
    x = tensor_list[0]
    bucket_dim = 1
    x_shape = x.shape
    tensor_sequence_length = x_shape[bucket_dim]
    batch_size = x_shape[bucket_dim - 1]
    buckets = [16, 32]
    idx = 0
    num_inputs = 3
    bucket = buckets[0]
    reshaped_tensors: list[torch.Tensor] = []
    bucket_idx = 0
    for idx, bucket in enumerate(buckets):
        if tensor_sequence_length <= bucket:
            bucket_idx = idx
            for tensor in tensor_list:
                if num_inputs == 0:
                    break
                delta = bucket - tensor_sequence_length
                padding_shape: list[int] = [batch_size, delta]
                zeros = torch.zeros(padding_shape, dtype=x.dtype)
                reshaped_tensors.append(torch.cat([tensor, zeros], dim=bucket_dim))
                num_inputs -= 1
            break
    return reshaped_tensors, torch.tensor([bucket_idx])


def get_bucket_kernel(*_):
    return torch.jit.script(sequence_length_bucket_kernel)


SEQUENCE_0 = [2, 17, 31, 8, 44, 5, 59, 3]
SEQUENCE_1 = [2, 9, 9, 41, 30, 12, 7, 7, 25, 18, 50, 6, 33, 3]


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        return get_bert_model()[0]


@pytest.fixture(scope="module")
def traced():
    paraphrase_s16, paraphrase_s32 = encode(SEQUENCE_0, 16), encode(SEQUENCE_1, 32)
    bucket_config = torch_neuronx.BucketModelConfig(get_bucket_kernel)
    return torch_neuronx.bucket_model_trace(
        get_bert_model, [paraphrase_s16, paraphrase_s32], bucket_config, compiler="inductor"
    )


@pytest.fixture(scope="module")
def file(traced, tmp_path_factory):
    return save(traced, tmp_path_factory.mktemp("models") / "bert.pt")


def assert_works(module, model):
    for words, length in [(SEQUENCE_0, 8), (SEQUENCE_0, 16), (SEQUENCE_1, 17), (SEQUENCE_1, 32)]:
        given = encode(words, length)
        with torch.no_grad():
            (wanted,) = model(*given)
        (got,) = module(*given)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_example(traced, model):
    assert multiprocessing.active_children() == []
    assert "neuron_ext-buckets" not in Path("/proc/self/maps").read_text()
    assert_works(traced, model)
    states = torch_neuronx.status(traced)
    assert [sum(one.executions) for one in states] == [2, 2]
    # The example's own comparison.
    paraphrase_s12, paraphrase_s28 = encode(SEQUENCE_0, 12), encode(SEQUENCE_1, 28)
    for shorter, full in [
        (paraphrase_s12, encode(SEQUENCE_0, 16)),
        (paraphrase_s28, encode(SEQUENCE_1, 32)),
    ]:
        assert torch.argmax(traced(*shorter)[0]) == torch.argmax(model(*full)[0])


@pytest.mark.slow
def test_too_long_a_text(traced):
    text = (
        r"no bucket fits the inputs input_ids \[1, 33\], attention_mask \[1, 33\]: .*"
        r"The buckets take 0: input_ids \[1, 16\], attention_mask \[1, 16\]; 1: input_ids \[1, 32\]"
    )
    with pytest.raises(RuntimeError, match=text):
        traced(*encode(SEQUENCE_1, 33))


def tables(module):
    """(bytes, size) of each constant, for each subgraph."""
    found = []
    for subgraph in subgraphs(module):
        _, _, _, int_lists, _, tensors = subgraph.__getstate__()[0]
        blob = tensors["weights"]
        places = zip(int_lists["constant_offsets"], int_lists["constant_sizes"], strict=True)
        found.append([bytes(blob[start : start + size].tolist()) for start, size in places])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("route", [lambda m: m, lambda m: loaded(saved_bytes(m)), copy.deepcopy])
def test_weights_are_in_memory_once(traced, model, route):
    module = route(traced)
    assert_works(module, model)
    first, second = subgraphs(module)
    blob = tensor_of(first, "weights")
    assert tensor_of(second, "weights").data_ptr() == blob.data_ptr()
    per_bucket = tables(module)
    distinct = {one for table in per_bucket for one in table}
    assert blob.numel() == sum(-(-len(one) // 64) * 64 for one in distinct)
    # There is something to share: nearly all of it.
    common = set(per_bucket[0]) & set(per_bucket[1])
    assert sum(map(len, common)) > 0.9 * sum(map(len, distinct))


def products():
    return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU()).eval(), {}


@pytest.mark.slow
def test_few_rows_and_many_share_weights():
    weights = []
    for index, rows in enumerate((16, 200)):
        inputs = (torch.ones(rows, 64),)
        job = Job(index, 2, products, {}, inputs, 1, None, (), "inductor")
        weights.append(compile_bucket(job).state[5]["weights"])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.slow
def test_weights_are_in_the_file_once(traced, file):
    size = tensor_of(subgraphs(traced)[0], "weights").numel()
    with zipfile.ZipFile(file) as archive:
        sizes = [one.file_size for one in archive.infolist()]
    assert sizes.count(size) == 1


@pytest.mark.slow
def test_a_new_process_checks_and_runs_them(traced, file, tmp_path):
    given = encode(SEQUENCE_0, 10), encode(SEQUENCE_1, 20)
    torch.save(given, tmp_path / "given.pt")
    torch.save([traced(*one)[0] for one in given], tmp_path / "wanted.pt")
    code = """
        import sys, torch, neuron_ext
        module = torch.jit.load(sys.argv[1])
        for given, wanted in zip(torch.load(sys.argv[2]), torch.load(sys.argv[3])):
            assert torch.equal(module(*given)[0], wanted)
        blobs = {
            getattr(module, f"subgraph_{i}").__getstate__()[0][5]["weights"].data_ptr()
            for i in range(2)
        }
        assert len(blobs) == 1
    """
    environment = {"NEURON_RT_VALIDATE_HASH": "TRUE"}
    run_python(code, file, tmp_path / "given.pt", tmp_path / "wanted.pt", env=environment)


# ------------------------------------------------------------------------------------- the parts


def state(*constants, pad=0):
    """Of a subgraph whose constants have these bytes, each behind ``pad`` bytes of nothing."""
    blob, offsets = bytearray(), []
    for one in constants:
        blob += b"\xff" * pad
        offsets.append(len(blob))
        blob += one
    lists = {"constant_offsets": offsets, "constant_sizes": list(map(len, constants)), "more": [1]}
    tensors = {"weights": torch.frombuffer(blob, dtype=torch.uint8)} if blob else {}
    return 1, {"checksum_weights": 5}, {"name": "x", "sha256_weights": "old"}, lists, {}, tensors


def constants_of(one):
    _, _, _, lists, _, tensors = one
    places = zip(lists["constant_offsets"], lists["constant_sizes"], strict=True)
    return [bytes(tensors["weights"][start : start + size].tolist()) for start, size in places]


def test_states_are_merged():
    a, b, c = b"a" * 100, b"b" * 64, b"c" * 3
    given = [state(a, b), state(c, b, a, c, pad=5), state(b"", a)]
    before = copy.deepcopy(given)
    merged = share_weights(given)
    assert [constants_of(one) for one in merged] == [[a, b], [c, b, a, c], [b"", a]]
    blob = merged[0][5]["weights"]
    assert all(one[5]["weights"] is blob for one in merged)
    assert blob.numel() == 128 + 64 + 64
    assert all(start % 64 == 0 for one in merged for start in one[3]["constant_offsets"])
    digest = hashlib.sha256(bytes(blob.tolist())).hexdigest()
    for one in merged:
        assert one[1] == {}
        assert one[2] == {"name": "x", "sha256_weights": digest}
        assert one[3]["more"] == [1]
    assert [constants_of(one) for one in given] == [constants_of(one) for one in before]
    assert given[0][2]["sha256_weights"] == "old"


def test_states_without_weights_are_left_alone():
    bare, full = state(), state(b"abc")
    assert share_weights([bare]) == [bare]
    kept, changed = share_weights([bare, full])
    assert kept is bare
    assert constants_of(changed) == [b"abc"]
