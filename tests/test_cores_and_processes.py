"""Which cores a process sees, and which it keeps from other processes."""

import contextlib
import os
import sys

import pytest
from helpers import ChildError, PythonProcess, run_python

OUTSIDE = "result = [core.global_index for core in neuron_ext.core_stats()]"


@pytest.fixture
def eight_cores(tmp_path):
    """The environment of a machine with eight cores that no other test shares."""
    return {"NEURON_EXT_HOST_CORES": 8, "NEURON_EXT_LOCK_DIR": tmp_path}


class TestVisibleCores:
    @pytest.mark.parametrize(
        ("text", "cores"),
        [
            ("3", [3]),
            ("0", [0]),
            ("0-3", [0, 1, 2, 3]),
            ("4-4", [4]),
            ("0,1", [0, 1]),
            ("2,0", [2, 0]),
            ("7,0-2,5", [7, 0, 1, 2, 5]),
            ("5-6,1-2", [5, 6, 1, 2]),
            (" 1 , 3 - 4 ", [1, 3, 4]),
            ("\t6", [6]),
            ("007", [7]),
            ("0-7", [0, 1, 2, 3, 4, 5, 6, 7]),
        ],
    )
    def test_are_those_named_in_the_order_named(self, fork_server, eight_cores, text, cores):
        env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": text}
        assert fork_server.run(OUTSIDE, env=env) == cores
        assert fork_server.run("result = neuron_ext.visible_core_count()", env=env) == len(cores)

    def test_are_renumbered_from_0_inside(self, fork_server, eight_cores, torchscript_file):
        code = """
            with neuron_ext.neuron_cores_context(start_nc=1):
                model = torch.jit.load(args[0])
            model(torch.ones(2, 3))
            result = [[c.index, c.global_index, c.executions] for c in neuron_ext.core_stats()]
        """
        env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "6,2"}
        assert fork_server.run(code, str(torchscript_file), env=env) == [[0, 6, 0], [1, 2, 1]]

    def test_win_over_the_number_of_cores(self, fork_server, eight_cores):
        for number in ("1", "8", "99"):
            env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "2-3", "NEURON_RT_NUM_CORES": number}
            assert fork_server.run(OUTSIDE, env=env) == [2, 3]

    @pytest.mark.parametrize(
        ("number", "cores"), [("1", [0]), ("3", [0, 1, 2]), ("0", [*range(8)])]
    )
    def test_by_number_are_the_first_free_ones(self, fork_server, eight_cores, number, cores):
        env = {**eight_cores, "NEURON_RT_NUM_CORES": number}
        assert fork_server.run(OUTSIDE, env=env) == cores

    def test_are_all_by_default_one_for_each_cpu(self, fork_server):
        code = "result = [[c.global_index, c.cpus] for c in neuron_ext.core_stats()]"
        cpus = sorted(os.sched_getaffinity(0))
        found = fork_server.run(code)
        assert [index for index, _ in found] == list(range(len(found)))
        assert len(found) <= len(cpus)  # a cgroup may grant fewer than the mask shows
        assert sorted(cpu for _, share in found for cpu in share) == cpus

    @pytest.mark.parametrize("runtime", ["auto", "host", "HOST"])
    def test_on_the_host_runtime(self, fork_server, eight_cores, runtime):
        env = {**eight_cores, "NEURON_EXT_RUNTIME": runtime}
        assert fork_server.run(OUTSIDE, env=env) == [*range(8)]


class TestCpusOfCores:
    CPUS = "result = [c.cpus for c in neuron_ext.core_stats()]"

    def test_are_shared_in_turn_when_there_are_more_cores(self, fork_server):
        cpus = sorted(os.sched_getaffinity(0))
        count = 2 * len(cpus) + 1
        shares = fork_server.run(self.CPUS, env={"NEURON_EXT_HOST_CORES": count})
        assert shares == [[cpus[i % len(cpus)]] for i in range(count)]

    def test_are_all_those_of_the_process_for_a_single_core(self, fork_server):
        shares = fork_server.run(self.CPUS, env={"NEURON_EXT_HOST_CORES": 1})
        assert [sorted(share) for share in shares] == [sorted(os.sched_getaffinity(0))]

    def test_belong_to_the_outside_number(self, fork_server, tmp_path):
        both = {"NEURON_EXT_HOST_CORES": 4, "NEURON_EXT_LOCK_DIR": tmp_path}
        all_shares = fork_server.run(self.CPUS, env=both)
        env = {**both, "NEURON_RT_VISIBLE_CORES": "3,0"}
        assert fork_server.run(self.CPUS, env=env) == [all_shares[3], all_shares[0]]

    def test_are_where_the_core_computes(self, fork_server):
        code = """
            import os, helpers_threads
            seen = []
            helpers_threads.test_ops.define("where(Tensor x) -> Tensor")
            helpers_threads.test_ops.impl(
                "where",
                lambda x: (seen.append(sorted(os.sched_getaffinity(0))), x + 1)[1],
                "CompositeExplicitAutograd",
            )
            where = lambda x: torch.ops.neuron_ext_test.where(x)
            zero = torch.zeros(1)
            mine = sorted(os.sched_getaffinity(0))
            module = neuron_ext.trace(where, zero, compiler="torchscript")
            neuron_ext.set_multicore(module)
            seen.clear()
            for _ in neuron_ext.core_stats():
                module(zero)
            result = [seen, [core.cpus for core in neuron_ext.core_stats()]]
            assert sorted(os.sched_getaffinity(0)) == mine
        """
        count = len(os.sched_getaffinity(0))
        seen, cpus = fork_server.run(code, env={"NEURON_EXT_HOST_CORES": count})
        # The first inference is not known to be brief yet.
        assert seen[0] == cpus[0]


JUNK = [
    ("NEURON_RT_VISIBLE_CORES", value, "8 cores (0-7)", "'0-3'")
    for value in (
        "", "  ", ",", "a", "1,", ",1", "1,,2", "-1", "1-", "1-2-3", "3-1", "0,0", "0-2,1", "8",
        "0-8", "99999999999999999999", "1.5", "0x1", "1 2", "all", "+1", "0;1", "\u0661",
    )
] + [
    (name, value, expected, "unset it")
    for name, expected, values in (
        ("NEURON_RT_NUM_CORES", "a number of cores", ("", "two", "-1", "1.0", "2 ", "9" * 20)),
        ("NEURON_EXT_HOST_CORES", "from 1 to 4096", ("", "0", "-4", "4097", "x", "1e3", "9" * 20)),
        ("NEURON_EXT_EXCLUSIVE", "one of true, false, 1, 0", ("", "yes", "2", "-1", " 1")),
        ("NEURON_EXT_RUNTIME", "one of auto, host, nrt", ("", "gpu", "host ", "1")),
        ("NEURON_RT_EXEC_TIMEOUT", "a number of seconds", ("", "-1", "1.5", "30s", "9" * 20)),
        ("NEURON_RT_LOG_LEVEL", "one of error, warning, info", ("", "loud", "3")),
        ("NEURON_RT_LOG_LOCATION", "one of console, syslog", ("", "file", "stderr")),
    )
    for value in values
]  # fmt: skip


class TestSettingsThatAreJunk:
    @pytest.mark.parametrize(("name", "value", "expected", "remedy"), JUNK)
    def test_are_quoted_with_what_is_expected(
        self, fork_server, eight_cores, name, value, expected, remedy
    ):
        with pytest.raises(ChildError) as caught:
            fork_server.run("neuron_ext.visible_core_count()", env={**eight_cores, name: value})
        assert caught.value.kind == "RuntimeError"
        assert f"{name}='{value}'" in caught.value.text
        assert expected in caught.value.text
        assert remedy in caught.value.text

    def test_more_cores_than_exist_say_what_exists(self, fork_server, eight_cores):
        with pytest.raises(ChildError, match="NEURON_RT_NUM_CORES=9") as caught:
            fork_server.run(OUTSIDE, env={**eight_cores, "NEURON_RT_NUM_CORES": 9})
        assert caught.value.kind == "RuntimeError"
        assert "this machine has 8 cores (0-7)" in caught.value.text

    def test_surface_at_every_first_need_and_can_be_corrected(self, fork_server, torchscript_file):
        code = """
            import os, helpers
            result = []
            module = helpers.trace_small_net()
            for use in (
                lambda: torch.jit.load(args[0]),
                lambda: neuron_ext.set_neuron_cores(module, 0),
                lambda: neuron_ext.set_multicore(module),
                lambda: neuron_ext.neuron_cores_context(0).__enter__(),
                lambda: neuron_ext.multicore_context().__enter__(),
                lambda: neuron_ext.wait(module),
                lambda: module(helpers.EXAMPLE),
                neuron_ext.core_stats,
            ):
                try:
                    use()
                except RuntimeError as error:
                    result.append("NEURON_RT_VISIBLE_CORES='junk'" in str(error))
            os.environ["NEURON_RT_VISIBLE_CORES"] = "1"
            assert torch.equal(module(helpers.EXAMPLE), helpers.expected())
        """
        env = {"NEURON_RT_VISIBLE_CORES": "junk", "NEURON_EXT_HOST_CORES": 2}
        assert fork_server.run(code, str(torchscript_file), env=env) == [True] * 8

    def test_nrt_says_that_it_is_not_to_be_had_here(self, fork_server):
        with pytest.raises(ChildError, match="NEURON_EXT_RUNTIME='nrt'") as caught:
            fork_server.run(OUTSIDE, env={"NEURON_EXT_RUNTIME": "nrt"})
        assert caught.value.kind == "RuntimeError"

    @pytest.mark.parametrize("value", ["", "yes", "DENIED"])
    def test_of_native_code_surface_at_the_load(self, native_file, fork_server, value):
        with pytest.raises(ChildError, match=f"NEURON_EXT_NATIVE_CODE='{value}'") as caught:
            fork_server.run(
                "torch.jit.load(args[0])", str(native_file), env={"NEURON_EXT_NATIVE_CODE": value}
            )
        assert caught.value.kind == "RuntimeError"
        assert "one of allow, signed, deny" in caught.value.text


class TestImport:
    def test_takes_no_core_prints_nothing_and_reads_no_setting(self, tmp_path):
        code = """
            import os, threading
            before = set(os.listdir("/proc/self/task"))
            import torch
            import neuron_ext
            neuron_ext.experimental.set_multicore(torch.nn.Identity())
            assert threading.active_count() == 1
        """
        env = {
            "NEURON_EXT_LOCK_DIR": tmp_path / "locks",
            "NEURON_RT_VISIBLE_CORES": "junk",
            "NEURON_RT_LOG_LEVEL": "junk",
        }
        done = run_python(code, env=env, returncode=None)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert list(tmp_path.iterdir()) == []

    def test_settings_made_after_it_count(self, fork_server, eight_cores):
        code = """
            import os
            os.environ["NEURON_RT_VISIBLE_CORES"] = "5"
            result = [core.global_index for core in neuron_ext.core_stats()]
        """
        assert fork_server.run(code, env=eight_cores) == [5]

    def test_settings_made_after_the_first_use_do_not(self, fork_server, eight_cores):
        code = "import os; neuron_ext.core_stats(); os.environ['NEURON_RT_VISIBLE_CORES'] = 'junk'"
        assert fork_server.run(f"{code}\n{OUTSIDE}", env=eight_cores) == [*range(8)]


HOLD = """
    import sys, neuron_ext
    print([core.global_index for core in neuron_ext.core_stats()], flush=True)
    sys.stdin.read()
"""


class TestReservation:
    """Each test has a lock folder of its own; holders hold until they are told to end."""

    def hold(self, env, **settings):
        return PythonProcess(HOLD, "--as-a-server", env={**env, **settings})

    def refused(self, fork_server, env, **settings):
        with pytest.raises(ChildError) as caught:
            fork_server.run(OUTSIDE, env={**env, **settings})
        assert caught.value.kind == "RuntimeError"
        return caught.value.text

    def test_a_taken_core_is_refused_naming_its_holder(self, fork_server, eight_cores):
        with self.hold(eight_cores, NEURON_RT_VISIBLE_CORES="2-3") as holder:
            assert holder.read_line() == "[2, 3]"
            text = self.refused(fork_server, eight_cores, NEURON_RT_VISIBLE_CORES="0,3")
            for part in ("core 3", f"process {holder.pid} (", sys.executable, "--as-a-server"):
                assert part in text
            assert "NEURON_RT_VISIBLE_CORES='0,3'" in text
            # Nothing stayed reserved by the refused one, and other cores are free.
            env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "0,1"}
            assert fork_server.run(OUTSIDE, env=env) == [0, 1]

    def test_a_number_of_cores_takes_free_ones_until_none_are_left(self, fork_server, eight_cores):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(self.hold(eight_cores, NEURON_RT_VISIBLE_CORES="1"))
            assert first.read_line() == "[1]"
            second = stack.enter_context(self.hold(eight_cores, NEURON_RT_NUM_CORES="4"))
            assert second.read_line() == "[2, 3, 4, 5]"
            env = {**eight_cores, "NEURON_RT_NUM_CORES": "3"}
            assert fork_server.run(OUTSIDE, env=env) == [0, 6, 7]
            text = self.refused(fork_server, eight_cores, NEURON_RT_NUM_CORES="4")
            assert "only 3 of 8 cores are free" in text
            for core, holder in ((1, first), (2, second), (5, second)):
                assert f"core {core} is held by process {holder.pid} (" in text

    def test_kill_9_frees_at_once(self, fork_server, eight_cores):
        env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "0-7"}
        with self.hold(env) as holder:
            assert holder.read_line() == "[0, 1, 2, 3, 4, 5, 6, 7]"
            assert f"process {holder.pid}" in self.refused(fork_server, env)
            holder.kill()
            assert fork_server.run(OUTSIDE, env=env) == [*range(8)]

    def test_processes_without_settings_share_all_cores(self, fork_server, eight_cores, tmp_path):
        with self.hold(eight_cores) as holder:
            assert holder.read_line() == "[0, 1, 2, 3, 4, 5, 6, 7]"
            assert fork_server.run(OUTSIDE, env=eight_cores) == [*range(8)]
            env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "0"}
            assert fork_server.run(OUTSIDE, env=env) == [0]

    def test_exclusive_takes_all_or_says_who_has_one(self, fork_server, eight_cores):
        exclusive = {**eight_cores, "NEURON_EXT_EXCLUSIVE": "1"}
        with self.hold(exclusive) as holder:
            assert holder.read_line() == "[0, 1, 2, 3, 4, 5, 6, 7]"
            for settings in ({"NEURON_RT_NUM_CORES": "1"}, {"NEURON_RT_VISIBLE_CORES": "7"}):
                text = self.refused(fork_server, eight_cores, **settings)
                assert f"process {holder.pid}" in text
            assert "NEURON_EXT_EXCLUSIVE" in self.refused(fork_server, exclusive)
            holder.finish()
        assert fork_server.run(OUTSIDE, env=exclusive) == [*range(8)]

    def test_a_child_process_does_not_keep_its_parents_cores(self, fork_server, eight_cores):
        code = """
            import subprocess, sys, neuron_ext
            neuron_ext.core_stats()
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            print(child.pid, flush=True)
            sys.stdin.read()
        """
        env = {**eight_cores, "NEURON_RT_VISIBLE_CORES": "4"}
        with PythonProcess(code, env=env) as holder:
            holder.read_line()
            assert f"process {holder.pid}" in self.refused(fork_server, env)
            holder.kill()
            assert fork_server.run(OUTSIDE, env=env) == [4]

    def test_a_lock_folder_that_is_not_there_is_named(self, fork_server, tmp_path):
        env = {"NEURON_EXT_LOCK_DIR": tmp_path / "gone", "NEURON_RT_NUM_CORES": "1"}
        text = self.refused(fork_server, env)
        assert str(tmp_path / "gone") in text
        assert "set NEURON_EXT_LOCK_DIR" in text

    def test_of_many_starting_at_once_each_core_goes_to_one(self, fork_server, eight_cores):
        code = """
            import json, os
            go, start = os.pipe()
            stay, leave = os.pipe()
            answers = []
            for _ in range(4):
                answer, write = os.pipe()
                if os.fork() == 0:
                    os.close(start)
                    os.close(leave)
                    os.read(go, 1)
                    try:
                        said = [core.global_index for core in neuron_ext.core_stats()]
                    except RuntimeError as error:
                        said = str(error)
                    os.write(write, json.dumps(said).encode())
                    os.close(write)
                    os.read(stay, 1)
                    os._exit(0)
                os.close(write)
                answers.append(answer)
            os.close(start)
            result = [json.loads(os.fdopen(answer).read()) for answer in answers]
            os.close(leave)
            assert [os.wait()[1] for _ in answers] == [0] * 4
        """
        answers = fork_server.run(code, env={**eight_cores, "NEURON_RT_NUM_CORES": "3"})
        taken = [core for answer in answers if isinstance(answer, list) for core in answer]
        assert sorted(taken) == sorted(set(taken))
        assert len(taken) == 6
        refused = [answer for answer in answers if isinstance(answer, str)]
        assert len(refused) == 2
        assert all("NEURON_RT_NUM_CORES=3: only 2 of 8 cores are free" in text for text in refused)
