"""Signed subgraphs, and processes that run no other native code."""

import base64
import copy
import ctypes
import hashlib
from pathlib import Path

import pytest
import torch
from helpers import EXAMPLE, bytes_of, expected, flip_byte, rebuild, run_each, save
from test_golden_files import FIELDS
from trace_helpers import assert_same, loaded, native_with_graph, saved_bytes, state_of

import neuron_ext

# Keys of the first two examples of RFC 8032, section 7.1: secret, public.
ALICE = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
)
MALLORY = (
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
    "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
)
# The DER around the 32 bytes of a key: RFC 8410.
SECRET, PUBLIC = "302e020100300506032b657004220420", "302a300506032b6570032100"
X25519_PUBLIC = "302a300506032b656e032100"


def pem(label, prefix, digits):
    body = base64.b64encode(bytes.fromhex(prefix + digits)).decode()
    return f"-----BEGIN {label} KEY-----\n{body}\n-----END {label} KEY-----\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder of key files."""
    folder = tmp_path_factory.mktemp("keys")
    for name, (secret, public) in {"alice": ALICE, "mallory": MALLORY}.items():
        (folder / f"{name}.pem").write_text(pem("PRIVATE", SECRET, secret))
        (folder / f"{name}.pub").write_text(pem("PUBLIC", PUBLIC, public))
    (folder / "both.pub").write_text(
        "# a comment\n" + (folder / "mallory.pub").read_text() + (folder / "alice.pub").read_text()
    )
    return folder


@pytest.fixture
def run(fork_server, keys):
    """Loads and runs files under NEURON_EXT_NATIVE_CODE=signed, in a process of their own."""

    def call(*files, trusted="alice.pub", policy="signed"):
        env = {"NEURON_EXT_NATIVE_CODE": policy, "NEURON_EXT_TRUSTED_KEYS": str(keys / trusted)}
        return run_each(fork_server, *files, **env)

    return call


def refused(keys, reason):
    return (
        "subgraph 'SmallNet' has native code that cannot run here: NEURON_EXT_NATIVE_CODE=signed "
        f"with NEURON_EXT_TRUSTED_KEYS='{keys / 'alice.pub'}' forbids it, since {reason}. It "
        "carries no portable graph to fall back on: trace it again on such a machine as this, or "
        'with compiler="torchscript", or with compiler_args="--portable-graph"'
    )


MISFIT = f"its signature is not one of {ALICE[1]} for what it holds"


def test_a_signature_goes_with_the_module_wherever_it_goes(small_net, keys):
    assert neuron_ext.sign(small_net, keys / "alice.pem") == ALICE[1]
    neuron_ext.verify(small_net, keys / "alice.pub")
    neuron_ext.verify(small_net, keys / "both.pub")
    again = loaded(saved_bytes(small_net))
    for other in (again, copy.deepcopy(again), torch.jit.freeze(again)):
        neuron_ext.verify(other, keys / "alice.pub")
        neuron_ext.verify(loaded(saved_bytes(other)), keys / "alice.pub")
        assert_same(other(EXAMPLE), expected())
    parallel = neuron_ext.DataParallel(again, device_ids=[0, 1])
    neuron_ext.verify(parallel, keys / "alice.pub")


def test_flags_and_placement_may_change(small_net, keys):
    neuron_ext.sign(small_net, keys / "alice.pem")
    neuron_ext.experimental.set_neuron_cores(small_net, 1, 2)
    neuron_ext.lazy_load(small_net)
    neuron_ext.async_load(small_net)
    neuron_ext.dynamic_batch(small_net)
    again = loaded(saved_bytes(small_net))
    neuron_ext.verify(again, keys / "alice.pub")
    (one,) = neuron_ext.status(again)
    assert (one.lazy_load, one.async_load, one.dynamic_batch) == (True, True, True)
    assert (one.start_nc, one.nc_count) == (1, 2)


def test_the_signature_is_that_of_openssl(small_net, keys):
    """And it is made of the documented fields: docs/state_format.md."""
    neuron_ext.sign(small_net, keys / "alice.pem")
    version, *bags = state_of(small_net)
    left_out = {"sha256_state", "signature", "signer", "lazy_load", "async_load", "dynamic_batch"}
    left_out |= {"start_nc", "nc_count"}

    def number(value):
        return int(value).to_bytes(8, "little", signed=True)

    def text(value):
        return number(len(value.encode())) + value.encode()

    def field(name, value):
        if isinstance(value, int):
            return number(value)
        if isinstance(value, str):
            return text(value)
        if isinstance(value, torch.Tensor):
            own = name in ("code", "weights", "graph")
            return number(value.nbytes) + (b"" if own else value.numpy().tobytes())
        items = [number(one) if isinstance(one, int) else text(one) for one in value]
        return number(len(items)) + b"".join(items)

    signed = number(version)
    for bag in bags:
        names = sorted(set(bag) - left_out)
        signed += number(len(names))
        signed += b"".join(text(name) + field(name, bag[name]) for name in names)
    message = f"neuron_ext subgraph 1 sha256:{hashlib.sha256(signed).hexdigest()}"
    assert bags[1]["signer"] == ALICE[1]
    # By the library that Python itself may use, called without this package.
    crypto = ctypes.CDLL("libcrypto.so.3")
    new_key, new_context = crypto.EVP_PKEY_new_raw_public_key, crypto.EVP_MD_CTX_new
    new_key.restype = new_context.restype = ctypes.c_void_p
    key = ctypes.c_void_p(new_key(1087, None, bytes.fromhex(ALICE[1]), ctypes.c_size_t(32)))
    signature = bytes.fromhex(bags[1]["signature"])
    for said, fits in ((message, 1), (message + " ", 0)):
        context = ctypes.c_void_p(new_context())
        assert crypto.EVP_DigestVerifyInit(context, None, None, None, key) == 1
        size = ctypes.c_size_t(len(said))
        found = crypto.EVP_DigestVerify(
            context, signature, ctypes.c_size_t(64), said.encode(), size
        )
        assert found == fits


def test_the_golden_file_of_version_1_stays_signed(keys):
    golden = torch.jit.load(Path(__file__).parent / "golden" / "state_v1_signed.pt")
    for module in (golden, loaded(saved_bytes(golden))):
        neuron_ext.verify(module, keys / "alice.pub")
        assert module(torch.tensor([1.0, 2.0, 3.0])).tolist() == [3.0, 5.0, 7.0]
        assert set(state_of(module)[2]) == {*FIELDS[2], "signature", "signer"}
    neuron_ext.unload(golden)


def test_verify_names_what_is_wrong(small_net, native_net, keys):
    unsigned = "subgraph 'SmallNet' cannot be trusted: it is not signed"
    with pytest.raises(RuntimeError, match=unsigned):
        neuron_ext.verify(small_net, keys / "alice.pub")
    neuron_ext.sign(small_net, keys / "mallory.pem")
    with pytest.raises(RuntimeError, match=f"signed by {MALLORY[1]}, which is not a trusted key"):
        neuron_ext.verify(small_net, keys / "alice.pub")
    # Signed again, by another.
    neuron_ext.sign(small_net, keys / "alice.pem")
    neuron_ext.verify(small_net, keys / "alice.pub")
    lying = rebuild(small_net, strings={"name": "Other"})
    with pytest.raises(RuntimeError, match=f"subgraph 'Other' cannot be trusted: {MISFIT}"):
        neuron_ext.verify(lying, keys / "alice.pub")
    neuron_ext.sign(native_net, keys / "alice.pem")
    weights = bytes_of(native_net, "weights").clone()
    flip_byte(weights)
    damaged = rebuild(native_net, tensors={"weights": weights})
    with pytest.raises(RuntimeError, match="the weights of subgraph 'SmallNet' is not what"):
        neuron_ext.verify(damaged, keys / "alice.pub")


def test_only_native_code_of_trusted_keys_runs(
    native_file, native_net, torchscript_file, keys, tmp_path, run
):
    neuron_ext.sign(native_net, keys / "alice.pem")
    by_alice = save(native_net, tmp_path / "alice.pt")
    neuron_ext.sign(native_net, keys / "mallory.pem")
    by_mallory = save(native_net, tmp_path / "mallory.pt")
    with_graph = tmp_path / "both.pt"
    with_graph.write_bytes(native_with_graph())
    files = (torchscript_file, with_graph, native_file, by_mallory, by_alice)
    stranger = f"it is signed by {MALLORY[1]}, which is not a trusted key"
    assert run(*files) == [
        ("right", 0),
        ("right", 0),
        (refused(keys, "it is not signed"), 0),
        (refused(keys, stranger), 0),
        ("right", 1),
    ]
    assert run(by_mallory, by_alice, trusted="both.pub") == [("right", 1), ("right", 1)]
    assert run(native_file, by_mallory, policy="allow") == [("right", 1), ("right", 1)]
    assert run(by_alice, policy="deny")[0][1] == 0


@pytest.mark.parametrize("name", ["code", "weights"])
@pytest.mark.parametrize("claim", [False, True], ids=["old digest", "new digest"])
def test_changed_contents_of_a_signed_file_are_not_mapped(
    native_net, keys, tmp_path, run, name, claim
):
    neuron_ext.sign(native_net, keys / "alice.pem")
    tensor = bytes_of(native_net, name).clone()
    flip_byte(tensor)
    digest = {f"sha256_{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}
    changed = rebuild(native_net, tensors={name: tensor}, strings=digest if claim else {})
    ((said, mapped),) = run(save(changed, tmp_path / "changed.pt"))
    what = {"code": "native code", "weights": "weights"}[name]
    if claim:
        assert said == refused(keys, MISFIT)
    else:
        assert said.startswith(f"the {what} of subgraph 'SmallNet' is damaged")
    assert mapped == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"string_lists": {"input_names": ["z"]}}, MISFIT),
        ({"string_lists": {"cpu_features": []}}, MISFIT),
        ({"strings": {"producer": "somebody else"}}, MISFIT),
        ({"ints": {"a_field_of_a_later_version": 1}}, "it is not signed"),
        ({"strings": {"signature": None, "signer": None}}, "it is not signed"),
        ({"strings": {"signature": "0" * 128}}, MISFIT),
        ({"strings": {"signer": MALLORY[1]}}, f"it is signed by {MALLORY[1]}, which is not a tru"),
    ],
)
def test_changed_fields_of_a_signed_file_are_found(native_net, keys, tmp_path, run, change, reason):
    neuron_ext.sign(native_net, keys / "alice.pem")
    ((said, mapped),) = run(save(rebuild(native_net, **change), tmp_path / "changed.pt"))
    assert (reason in said, mapped) == (True, 0), said


@pytest.mark.parametrize("field", ["signature", "signer"])
@pytest.mark.parametrize("value", [None, "", "ab", "0" * 63 + "G", "0" * 127 + " ", "0" * 1000])
def test_signatures_that_are_none_are_refused(small_net, keys, field, value):
    neuron_ext.sign(small_net, keys / "alice.pem")
    with pytest.raises(RuntimeError, match=f"{field}"):
        rebuild(small_net, strings={field: value})


def test_keys_that_are_none_are_named_and_sign_nothing(small_net, keys, tmp_path):
    junk = {
        "public.pem": (keys / "alice.pub").read_text(),
        "empty.pem": "",
        "cut.pem": (keys / "alice.pem").read_text()[:60],
        "x25519.pem": pem("PRIVATE", "302e020100300506032b656e04220420", ALICE[0]),
        "encrypted.pem": (  # password: secret
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
            "MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAh5RVjO0I3ckQICCAAw\n"
            "DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEBmvIILNkamtqZvjT8e0jLEEQCMg\n"
            "kLhDCdaR+s0LRJu6S7txgZAqw1LKTgZRRqqFtHjigq4VaChQlybYqd0hsDEaxsTN\n"
            "ksGznZgRw89apjF9quk=\n"
            "-----END ENCRYPTED PRIVATE KEY-----\n"
        ),
    }
    for name, text in junk.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"'{tmp_path / name}' is not an unencrypted Ed25519"):
            neuron_ext.sign(small_net, tmp_path / name)
    with pytest.raises(ValueError, match=r"the key file '/nowhere/key.pem' cannot be read"):
        neuron_ext.sign(small_net, "/nowhere/key.pem")
    assert "signature" not in state_of(small_net)[2]
    with pytest.raises(ValueError, match="the module has no subgraph to sign"):
        neuron_ext.sign(torch.nn.Linear(2, 2), keys / "alice.pem")

    (tmp_path / "x25519.pub").write_text(pem("PUBLIC", X25519_PUBLIC, ALICE[1]))
    for path in (tmp_path / "x25519.pub", keys / "alice.pem", tmp_path / "empty.pem"):
        with pytest.raises(ValueError, match=f"'{path}' does not hold Ed25519 public keys"):
            neuron_ext.verify(small_net, path)
    with pytest.raises(ValueError, match=r"the key file '/nowhere' cannot be read"):
        neuron_ext.verify(small_net, "/nowhere")


def test_settings_that_cannot_work_run_nothing(native_net, keys, tmp_path, fork_server, run):
    neuron_ext.sign(native_net, keys / "alice.pem")
    file = save(native_net, tmp_path / "model.pt")
    assert run_each(fork_server, file, NEURON_EXT_NATIVE_CODE="signed") == [
        (
            "NEURON_EXT_NATIVE_CODE=signed needs NEURON_EXT_TRUSTED_KEYS: set it to a PEM file of "
            "the Ed25519 public keys whose native code may run",
            0,
        )
    ]
    assert run(file, trusted="none.pub") == [
        (
            f"NEURON_EXT_TRUSTED_KEYS: the key file '{keys / 'none.pub'}' cannot be read",
            0,
        )
    ]
    ((said, mapped),) = run(file, trusted="alice.pem")
    assert said.startswith("NEURON_EXT_TRUSTED_KEYS: ")
    assert "does not hold Ed25519" in said
    assert mapped == 0
