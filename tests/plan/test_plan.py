"""The plan of a small run, compiled by the real TPU compiler."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os

import jax
import numpy as np
import pytest

from p2r_jax.config import ModelConfig, OptimizerConfig, RolloutConfig
from p2r_jax.ops import splash, triton_attention
from p2r_jax.ops.splash import Rule, executed_scores
from p2r_jax.parallel.flops import matmul_flops
from p2r_jax.parallel.mesh import make_mesh
from p2r_jax.plan import compile as compiling
from p2r_jax.plan import search as searching
from p2r_jax.plan.chips import GIB, Slice
from p2r_jax.plan.command import plan as plan_command
from p2r_jax.plan.programs import programs
from p2r_jax.plan.report import make_plan, markdown, verdict
from p2r_jax.plan.search import candidates, changed, remedies, suggestions
from p2r_jax.plan.shapes import Shapes
from p2r_jax.rl.memory import opt_state_bytes, tree_bytes
from p2r_jax.rl.optimizer import make_optimizer
from tests.benchmarks import plan_matrix
from tests.plan.small import small_model, small_run

V5E = Slice.parse("v5e:2x2")


@pytest.fixture(scope="session")
def keep(tmp_path_factory):
    """A folder of all test processes: one compiles for the others."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "plans"
    folder.mkdir(exist_ok=True)
    return folder


# Of the session: a worker runs the classes of this file at different times, and this takes minutes.
@pytest.fixture(scope="session")
def made(keep):
    pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
    with (keep / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make_plan(small_run(), small_model(), V5E, keep)


@pytest.fixture(scope="module")
def rows(made):
    return {row.program.name: row for row in made.rows}


def starting(rows, name):
    (row,) = (row for key, row in rows.items() if key.startswith(name))
    return row


class TestEveryProgramIsThere:
    def test_of_both_roles_and_all_stages(self, rows):
        kinds = sorted({tuple(name.split(", ")[:2]) for name in rows})
        both = ("evidence", "prefill", "start", "decode", "grow")
        expected = [(kind, role) for kind in both for role in ("perceiver", "reasoner")]
        expected += [("reference", "reasoner"), ("update", "reasoner")]
        own = [kind for kind in kinds if len(kind) > 1 and "drift" not in kind[0]]
        assert own == sorted(expected)
        others = {kind[0] for kind in kinds if kind not in own}
        assert others == {"weights for decoding", "snapshot of a phase", "drift of the other role"}

    def test_the_policy_decodes_groups_and_the_partner_single_answers(self, rows):
        decoding = [name for name in rows if name.startswith("decode")]
        assert decoding == [
            "decode, reasoner, 8 × 2, 64 tokens",
            "decode, perceiver, 8 × 1, 64 tokens",
        ]

    def test_with_the_kernels_that_they_are_meant_to_have(self, rows):
        for name, row in rows.items():
            kind = name.split(", ")[0]
            expected = {"prefill": 2, "decode": 1, "reference": 2, "drift of the other role": 2}
            expected |= {"update": 8, "weights for decoding": 0, "start": 0, "grow": 0}
            if kind in expected:  # Vision and text; backward passes have two each, and recompute.
                assert row.compiled.kernels == expected[kind], name


class TestMemory:
    def test_is_what_lies_beside_and_what_the_compiler_says(self, rows):
        for row in rows.values():
            c = row.compiled
            own = c.arguments + c.results + c.temporary + c.code
            assert row.total == own + sum(row.program.beside.values())
            assert c.over is None

    def test_of_the_update_counts_every_array_once(self, rows):
        """Its arguments are the state and the batch; beside lie the snapshot and the images."""
        config = small_run()
        shapes = Shapes(config, small_model(), V5E.mesh(config.mesh), "pallas_tpu")
        row = starting(rows, "update, reasoner")
        moments = opt_state_bytes(OptimizerConfig(), shapes.trained)
        batch = tree_bytes(shapes.batch(config.phases[0], reference=True))
        flags = small_model().text.vocab_size
        own = tree_bytes(shapes.trained) + moments + batch + flags
        assert row.compiled.arguments == pytest.approx(own, rel=0.03)  # tiles are padded
        assert row.program.beside == {
            "source images": tree_bytes(shapes.images(8)),
            "snapshot, bfloat16": tree_bytes(shapes.snapshot),
        }

    def test_decoding_holds_two_copies_of_the_weights_and_the_trained_ones(self, rows):
        row = starting(rows, "decode, perceiver")
        assert set(row.program.beside) == {
            "trained weights, float32",
            "optimizer, adamw",
            "snapshot, bfloat16",
            "decoding weights of the partner",  # the others are its argument
            "source images",
            "patches of the reasoner's prompts",
        }


class TestTwoPhases:
    def test_what_they_share_is_there_once_with_the_larger_needs_beside(self):
        """The frozen reasoner's prefill and the learning one's are one program; the latter's caches
        are larger."""
        rollout = RolloutConfig(slots=4, greedy_slots=4)
        one = small_run(rollout=rollout)
        first = dataclasses.replace(one.phases[0], role="perceiver")
        both = small_run(phases=[first, one.phases[0]], rollout=rollout)
        mesh = make_mesh(1, 2, 2, jax.devices()[:4])

        def prefill(config):
            (found,) = (
                program
                for program in programs(Shapes(config, small_model(), mesh, "xla"))
                if program.name.startswith("prefill, reasoner")
            )
            return found, sum(found.beside.values())

        (alone, small), (_, large) = (
            prefill(small_run(phases=[first], rollout=rollout)),
            prefill(one),
        )
        shared, most = prefill(both)
        assert small < large == most
        assert shared.times == alone.times + prefill(one)[0].times


class TestFlops:
    def test_scores_of_blocks_that_are_not_skipped(self):
        """Against the rule itself, block by block."""
        assert executed_scores(2560, causal=False) == 2560**2
        assert executed_scores(1024) == 3 * 512**2
        rule, block = Rule(2560 + 8 * 64, 2560, 64), 512
        size = -(-rule.size // block) * block
        whole = np.zeros((size, size), bool)
        whole[: rule.size, : rule.size] = rule[slice(0, rule.size), slice(0, rule.size)]
        blocks = whole.reshape(size // block, block, size // block, block).any((1, 3)).sum()
        assert executed_scores(2560, 8, 64) == blocks * block**2

    @pytest.mark.parametrize("kernels", ["pallas_tpu", "pallas_gpu"])
    def test_kernels_count_as_the_products_that_they_are(self, kernels):
        """Vision attention skips nothing: its kernel and plain XLA have the same FLOPs."""
        config = small_run()
        mesh = make_mesh(1, 2, 2, jax.devices()[:4])
        found = []
        for own in (kernels, "xla"):
            shapes = Shapes(config, small_model(), mesh, own)
            program = next(p for p in programs(shapes) if p.name.startswith("prefill, reasoner"))
            traced = program.trace()
            flops = compiling._kernel_flops(program.scores)
            found.append(matmul_flops(traced.jaxpr, trips=1, kernel_flops=flops))
        kernel, plain = found
        text = small_model().text
        heads, width, layers = text.num_attention_heads, text.head_dim, text.num_hidden_layers
        executed = {"pallas_tpu": splash, "pallas_gpu": triton_attention}[kernels].executed_scores
        skipped = 1536**2 - executed(1536)
        rows = 8
        assert skipped > 0
        assert plain - kernel == pytest.approx(4 * rows * layers * heads * width * skipped)

    @pytest.mark.parametrize("kernels", ["pallas_tpu", "pallas_gpu"])
    @pytest.mark.parametrize("name, weight", [("drift", 0.0), ("update", 0.1)])
    def test_the_other_role_can_be_counted(self, kernels, name, weight):
        """As a program of its own, or where the update holds on to it."""
        config = small_run()
        config.phases[0].role_anchor = weight
        shapes = Shapes(config, small_model(), make_mesh(1, 2, 2, jax.devices()[:4]), kernels)
        (program,) = (p for p in programs(shapes) if p.name.startswith(name))
        flops = compiling._kernel_flops(program.scores)
        assert matmul_flops(program.trace().jaxpr, trips=1, kernel_flops=flops) > 1e9

    def test_scores_of_the_blocks_that_a_gpu_visits(self):
        """Against the rule itself, block by block."""
        rule, blocks = Rule(2560 + 8 * 63, 2560, 63), triton_attention.BY_QUERIES
        whole = np.zeros([-(-rule.size // n) * n for n in (blocks.queries, blocks.keys)], bool)
        whole[: rule.size, : rule.size] = rule[slice(0, rule.size), slice(0, rule.size)]
        parts = whole.reshape(-1, blocks.queries, whole.shape[1] // blocks.keys, blocks.keys)
        visited = parts.any((1, 3)).sum() * blocks.queries * blocks.keys
        assert visited <= triton_attention.executed_scores(2560, 8, 63) <= visited * 1.02
        assert triton_attention.executed_scores(2560, causal=False) == 2560**2

    def test_a_token_of_decoding_reads_the_weights_and_the_caches_once(self, rows):
        config = small_run()
        shapes = Shapes(config, small_model(), V5E.mesh(config.mesh), "pallas_tpu")
        row = starting(rows, "decode, reasoner")
        rollout = shapes.rollouts(config.phases[0], config.phases[0])[0]
        caches = sum(tree_bytes((c.keys, c.values)) for c in shapes.slots(rollout, 64))
        ideal = tree_bytes(shapes.decoding["language_model"]) + caches
        assert ideal <= row.compiled.moved <= 1.6 * ideal


class TestWhatDoesNotFit:
    @pytest.fixture
    def little(self, monkeypatch):
        """Chips with less memory than the plan needs; the compiler is not asked again."""

        def of(size):
            return dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, usable=int(size)))

        return of

    def test_names_the_program_and_the_largest_arrays(self, made, keep, little):
        where = little(0.9 * made.peak.total)
        plan = make_plan(small_run(), small_model(), where, keep)
        assert not plan.fits
        first, second = verdict(plan)[:2]
        assert first.startswith("does not fit by ")
        assert plan.peak.program.name in first
        assert second.startswith("largest: ")

    def test_suggestions_were_tried(self, made, keep, little):
        row = starting({r.program.name: r for r in made.rows}, "decode, reasoner")
        where = little(row.total - 1)
        plan = dataclasses.replace(made, where=where, rows=[row])
        told = suggestions(small_run(), small_model(), plan, keep)
        assert told[0].startswith("decode, reasoner: rollout.slots 4: ")
        assert told[-1].endswith(" GiB, fits")

    def test_the_compilers_refusal_is_read(self):
        message = (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.00G of 15.75G hbm. Exceeded hbm capacity by 5.25G.\n\n"
            "  Largest program allocations in hbm:\n\n"
            '  1. Size: 4.00G\n     Operator: op_name="jit(f)/while/body/dot"\n'
            "     Shape: f32[1024,1048576]{1,0:T(8,128)}\n"
        )
        found = compiling._too_large(message)
        assert found.over == int(5.25 * GIB)
        assert found.largest == ["4.00G f32[1024,1048576] while/body/dot"]

    def test_so_is_its_other_way_to_say_it(self):
        """Before it has placed a single array."""
        message = (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (25.22G) exceeds available HBM (15.75G)."
        )
        found = compiling._too_large(message)
        assert found.over == pytest.approx(9.47 * GIB, rel=1e-6)
        assert found.largest == []

    def test_a_program_that_is_too_large_is_a_row_and_not_an_exception(self, keep):
        """The real compiler refuses it."""
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        config = changed(small_run(), {"mesh.fsdp": 1, "mesh.tensor": 1})
        one = dataclasses.replace(config.phases[0], prompts=4096, group=64, microbatch=0)
        config.phases = [one]
        shapes_of = dataclasses.replace(config, model=ModelConfig(max_pixels=512 * 512))
        plan = make_plan(shapes_of, small_model(), V5E, keep, only=["update"])
        (row,) = plan.rows
        assert row.compiled.over is not None
        assert row.compiled.over > 0
        assert not plan.fits


class TestCache:
    def test_nothing_is_compiled_twice(self, made, keep, monkeypatch):
        def refuse(*_):
            raise AssertionError("compiled again")

        monkeypatch.setattr(compiling, "_read", refuse)
        again = make_plan(small_run(), small_model(), V5E, keep)
        assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in made.rows]

    def test_another_program_is_another_entry(self, tmp_path):
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        other = changed(small_run(), {"rollout.columns": 1})
        for run, columns, entries in ((small_run(), 2, 1), (small_run(), 2, 1), (other, 1, 2)):
            (row,) = make_plan(run, small_model(), V5E, tmp_path, only=["decode, reasoner"]).rows
            assert row.program.name == f"decode, reasoner, 8 × {columns}, 64 tokens"
            assert len(list(tmp_path.iterdir())) == entries


class TestSearch:
    def test_meshes_divide_the_heads_and_batches_the_mesh(self):
        pytest.importorskip("libtpu", reason="no TPU compiler (libtpu) in this environment")
        found = list(candidates(small_run(), small_model(), V5E))
        assert {change["mesh.tensor"] for change in found} == {1, 2}  # two key-value heads
        assert {c["microbatch"] for c in found if c["mesh.tensor"] == 2} == {2, 4, 8}
        assert {c["microbatch"] for c in found if c["mesh.tensor"] == 1} == {4, 8}

    def test_the_fastest_that_fits_comes_first_and_hopeless_ones_are_not_compiled(
        self, made, monkeypatch, keep
    ):
        """Of tensor 1, larger microbatches; the plans are made up from one that was compiled."""
        asked = []

        def fake(config, model, where, keep, watch, give_up):
            asked.append((config.mesh.tensor, config.phases[0].microbatch))
            if asked[-1] == (2, 8):
                raise ValueError("heads do not divide")
            usable = made.peak.total - (config.mesh.tensor == 1)
            where = dataclasses.replace(where, chip=dataclasses.replace(where.chip, usable=usable))
            # A larger microbatch is faster.
            rows = made.rows[: len(made.rows) - config.phases[0].microbatch]
            return dataclasses.replace(made, where=where, rows=[*rows, made.peak])

        monkeypatch.setattr(searching, "make_plan", fake)
        found = searching.search(small_run(), small_model(), V5E, keep)
        assert asked == [(1, 4), (2, 2), (2, 4), (2, 8)]
        ranked = [(c["mesh.tensor"], c["microbatch"]) for c, _ in found]
        assert ranked[:3] == [(2, 4), (2, 2), (1, 4)]
        assert [own.fits for _, own in found[:3]] == [True, True, False]
        reasons = {(c["mesh.tensor"], c["microbatch"]): own for c, own in found[3:]}
        assert reasons == {
            (1, 8): "microbatch 4 does not fit already",
            (2, 8): "heads do not divide",
        }

    def test_a_search_gives_up_at_the_first_program_that_does_not_fit(self, keep, made):
        chip = dataclasses.replace(V5E.chip, usable=made.rows[0].total - 1)
        where = dataclasses.replace(V5E, chip=chip)
        plan = make_plan(small_run(), small_model(), where, keep, give_up=True)
        assert [row.program.name for row in plan.rows] == [made.rows[0].program.name]
        assert not plan.fits
        told = plan.as_dict()
        assert (told["complete"], told["seconds"]) == (False, None)

    def test_remedies_for_each_stage(self, made):
        by_stage = {row.program.stage: row for row in made.rows}
        names = lambda stage: {
            key for change in remedies(small_run(), made, by_stage[stage]) for key in change
        }
        assert {"rollout.slots", "rollout.greedy_slots", "mesh.tensor"} <= names("rollout")
        assert {"microbatch", "optimizer.name", "mesh.tensor"} <= names("update")

    def test_a_change_leaves_the_settings_alone(self):
        before = small_run()
        after = changed(before, {"microbatch": 1, "mesh.tensor": 4})
        assert [phase.microbatch for phase in after.phases] == [1]
        assert (before.mesh.tensor, before.phases[0].microbatch) == (2, 4)


class TestOutput:
    def test_json_says_it_all(self, made):
        whole = json.loads(json.dumps(made.as_dict()))
        assert whole["fits"] is True
        assert whole["topology"] == "v5e:2x2"
        assert len(whole["programs"]) == len(made.rows)
        assert whole["peak"] == made.peak.total

    def test_the_markdown_has_a_line_for_each_program(self, made):
        lines = markdown(made).splitlines()
        assert len(lines) == 2 + len(made.rows)
        assert all(line.count("|") == 9 for line in lines)

    def test_the_command_prints_a_table_and_a_verdict(self, made, keep, monkeypatch, capsys):
        monkeypatch.setattr("p2r_jax.plan.command.config_of", lambda name: small_model())
        monkeypatch.setattr("p2r_jax.plan.command.cache_folder", lambda: keep)
        assert plan_command(small_run(), "v5e:2x2")
        out = capsys.readouterr().out
        assert "decode, reasoner" in out
        assert "\nfits by " in out


def test_without_a_budget_the_setting_is_named():
    config = small_run(model=ModelConfig())
    mesh = make_mesh(1, 2, 2, jax.devices()[:4])
    shapes = Shapes(config, small_model(), mesh, "xla")
    with pytest.raises(ValueError, match=r"set model\.max_pixels"):
        shapes.prompt("perceiver")


def test_the_state_lies_where_the_trainer_puts_it():
    """Moments like their parameters, counters everywhere."""
    config = small_run()
    shapes = Shapes(config, small_model(), make_mesh(1, 2, 2, jax.devices()[:4]), "xla")
    state = shapes.state(make_optimizer(config.optimizer, 1))
    assert tree_bytes(state.opt_state) == opt_state_bytes(config.optimizer, shapes.trained)


class TestMatrix:
    def test_a_row_has_the_tightest_memory_the_roofline_and_the_slowest_compile(self, made):
        found = made.as_dict()
        for program in found["programs"]:
            program["total"], program["compile_seconds"] = 2**30, 7.0
            program["seconds"] = {"compute": 1.0, "memory": 10.0}
        count = lambda stage: sum(p["stage"] == stage for p in found["programs"])
        longest = next(p for p in found["programs"] if p["stage"] == "update")
        longest |= {"total": 5 * 2**29, "compile_seconds": 41.2}
        seconds = f"{10 * count('rollout')} + {10 * count('update')}"
        found |= {"usable": 4 * 2**30, "peak": 5 * 2**29}
        row = plan_matrix.line("p2r_2b", "v5e-16", found)
        assert row == (
            f"| `p2r_2b` | `v5e-16` | 1.00 | 2.50 | 4.00 | fits, 1.50 left | {seconds} | 41 |"
        )
        found["usable"] = 2**30
        assert "| **too much by 1.50** |" in plan_matrix.line("p2r_2b", "v5e-16", found)

    def test_the_readme_has_the_columns_of_the_command(self):
        text = (plan_matrix.ROOT / "launch" / "README.md").read_text()
        begin, end = plan_matrix.MARKS
        table = text.split(begin)[1].split(end)[0].strip().splitlines()
        assert "\n".join(table[:2]) == plan_matrix.HEAD
        told = {tuple(row.replace("`", "").split(" | ")[:2]) for row in table[2:]}
        assert told == {(f"| {name}", mesh) for name, mesh, _ in plan_matrix.WANTED}

    def test_the_table_goes_between_the_marks(self, made, tmp_path, monkeypatch, capsys):
        answers = iter([made.as_dict(), "exit code 2"])
        monkeypatch.setattr(plan_matrix, "plan", lambda *wanted: next(answers))
        begin, end = plan_matrix.MARKS
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
        plan_matrix.main(["--slices", "v5e-16", "--readme", str(readme)])
        lines = readme.read_text().splitlines()
        assert lines[:2] == ["before", begin]
        assert lines[-2:] == [end, "after"]
        table = lines[2:-2]
        assert len({row.count("|") for row in table}) == 1
        assert "| failed: exit code 2 |" in table[3]
        assert "\n".join(table) in capsys.readouterr().out
