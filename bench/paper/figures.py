"""Which runs each figure of the paper needs, and what a reader sees of them: curves as CSV, a plot,
and a table of final numbers beside what the paper says."""

import argparse
import csv
import json
import math
import pathlib
import shutil
from functools import partial

import numpy as np

import bench.__main__
from bench import measure, report
from bench.paper import imitation, lqr
from bench.paper.imitation import Setting
from bench.paper.trials import Trained

POINTS = 50  # of each curve in the CSV
FLOOR = 1e-14  # of what is drawn: float32 resolves no less
COLORS = dict(zip(imitation.METHODS, ("C7", "C1", "C0", "C2", "C3"), strict=True))
SIZES = (10, 50, 100)
TRIALS, STARTS = 4, 8
EPOCHS, EPOCHS_5, ITERATIONS = 1000, 250, 5000
MPC = ("mpc.dx", "mpc.cost", "mpc.cost.dx")


class Figure:
    """A figure: its runs by their settings, and what it writes. `name` begins every file of it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.quick = args, args.quick
        self.output: pathlib.Path = args.output

    def plans(self) -> dict:
        """By setting, functions that make a run (see ``trials.train``)."""
        raise NotImplementedError

    def write(self, trained: dict) -> None:
        """The CSV, the plot and the table."""
        raise NotImplementedError

    def imitations(self, settings, num_trials: int, num_epochs: int) -> dict:
        seeds = [self.args.seed + k for k in range(2 if self.quick else num_trials)]
        epochs, chunk = (4, 2) if self.quick else (num_epochs, 10)
        return {setting: partial(imitation.run, setting, seeds, epochs, chunk)
                for setting in settings}  # fmt: skip

    def save_text(self, parts: list[str], trained: dict) -> None:
        seconds = sum(trained[key].seconds for key in self.plans())
        end = (
            f"`{report.command(self.args)}`: {seconds / 60:.1f} minutes of one process, "
            f"compilation included.  \n{measure.cpu()}, float32. "
            f"{report.versions('jaxmpc', 'jax', 'optax')}."
        )
        report.save_text(self.output, self.name, "\n\n".join([*parts, end]))

    def save_csv(self, rows: list[dict]) -> None:
        path = self.output / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: _short(v) for k, v in row.items()})

    def draw(self, figure) -> None:
        figure.savefig(self.output / f"{self.name}.png", dpi=80)


def _short(value):
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _axes(rows: int, columns: int, width=4.2, height=3.2, **options):
    size = (width * columns, height * rows)
    figure, axes = report.pyplot().subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat:
        axis.grid(True, which="major", linewidth=0.3)
        axis.tick_params(labelsize=8)
    return figure, axes


def _thinned(num: int) -> list[int]:
    """Epochs of a curve that are written down: every so many, and the last."""
    return sorted({*range(0, num, max(1, num // POINTS)), num - 1})


# Sections 5.3 and 5.4.

LOSSES = ("train", "validation", "test", "train_transition", "test_transition")


def best_epochs(run: Trained) -> np.ndarray:
    """The epoch with the lowest validation loss of each trial; a loss that is not finite loses."""
    validation = run.curves["validation"]
    return np.argmin(np.where(np.isfinite(validation), validation, np.inf), axis=0)


def at_best(run: Trained, name: str) -> np.ndarray:
    """[trials, …] of a curve."""
    best = best_epochs(run)
    return run.curves[name][best, np.arange(len(best))]


def identified(setting: Setting, physics: np.ndarray) -> dict[str, np.ndarray]:
    """What controls can tell of the constants [..., k]: g/l and m·l² of the pendulum, in which its
    three appear in no other way, and the cartpole's four."""
    if setting.domain == "cartpole":
        return dict(zip(("g", "m_c", "m_p", "l"), np.moveaxis(physics, -1, 0), strict=True))
    g, m, l = np.moveaxis(physics, -1, 0)
    return {"g/l": g / l, "m l²": m * l**2}


def physics_error(setting: Setting, run: Trained) -> np.ndarray:
    """The largest relative error of what can be identified [trials]; NaN where none is learned."""
    if "physics" not in run.curves:
        return np.full(run.curves["test"].shape[1], np.nan)
    domain = imitation.DOMAINS[setting.domain]
    expert = np.array(domain.expert_params().physics[: len(domain.guess)], float)
    learned = identified(setting, at_best(run, "physics").astype(float))
    true = identified(setting, expert)
    return np.max([np.abs(learned[name] / true[name] - 1.0) for name in true], axis=0)


def cost_error(setting: Setting, run: Trained) -> np.ndarray:
    """How far the direction of (q, p) is from the expert's [trials]: its scale moves nothing."""
    if "logit" not in run.curves:
        return np.full(run.curves["test"].shape[1], np.nan)
    q = 1.0 / (1.0 + np.exp(-at_best(run, "logit").astype(float)))
    learned = np.concatenate((q, np.sqrt(q) * at_best(run, "p_hat")), -1)
    true = np.concatenate(imitation.DOMAINS[setting.domain].expert_params().cost)
    unit = [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (learned, true)]
    return np.linalg.norm(unit[0] - unit[1], axis=-1)


def curve_rows(settings, trained, seed: int) -> list[dict]:
    """A row for each trial and epoch that is kept, and for the best epoch of each trial."""
    rows = []
    for setting in settings:
        run = trained[setting]
        num_epochs, num_trials = run.curves["test"].shape
        best = best_epochs(run)
        for trial in range(num_trials):
            for epoch in sorted({*_thinned(num_epochs), int(best[trial])}):
                row = dict(
                    domain=setting.domain,
                    method=setting.method,
                    num_train=setting.num_train,
                    hessian=setting.hessian,
                    seed=seed + trial,
                    epoch=epoch,
                    best=int(epoch == best[trial]),
                )
                row |= {name: run.curves[name][epoch, trial] for name in LOSSES}
                row["converged"] = run.curves["converged"][epoch, trial]
                for name in ("physics", "logit", "p_hat"):
                    values = run.curves.get(name)
                    if values is not None:
                        row |= {f"{name}{k}": v for k, v in enumerate(values[epoch, trial])}
                rows.append(row)
    return rows


def final_table(settings, trained, with_hessian: bool = False) -> str:
    """Every trial's test loss at the epoch with its best validation loss, and what was learned."""
    num_trials = max(trained[setting].curves["test"].shape[1] for setting in settings)
    header = ["domain", "method", *(["Hessian"] if with_hessian else []), "trajectories"]
    left = len(header) - 1
    header += [f"trial {k + 1}" for k in range(num_trials)]
    header += ["median", "train, median", "error of physics", "error of cost"]
    header += ["converged", "minutes"]
    lines = []
    for setting in settings:
        run = trained[setting]
        test = at_best(run, "test")
        errors = physics_error(setting, run), cost_error(setting, run)
        words = [setting.domain, f"`{setting.method}`"]
        words += [setting.hessian] if with_hessian else []
        lines.append(
            [*words, str(setting.num_train)]
            + [report.number(float(loss)) for loss in test]
            + ["–"] * (num_trials - len(test))
            + [report.number(float(np.median(test)))]
            + [report.number(float(np.median(at_best(run, "train"))))]
            + ["–" if np.isnan(e).all() else f"{np.median(e):.2g}, {np.max(e):.2g}" for e in errors]
            + [f"{np.mean(run.curves['converged']):.2%}", f"{run.seconds / 60:.1f}"]
        )
    return report.markdown(header, lines, left=left)


class Imitation(Figure):
    """What Figures 4 and 6 share: the same runs."""

    def settings(self) -> list[Setting]:
        domains = ("pendulum",) if self.quick else ("pendulum", "cartpole")
        sizes = SIZES[:1] if self.quick else SIZES
        return [
            Setting(domain, method, size, hidden=16 if self.quick else imitation.HIDDEN)
            for domain in domains
            for size in sizes
            for method in imitation.METHODS
        ]

    def plans(self):
        return self.imitations(self.settings(), TRIALS, EPOCHS)

    def scatter(self, axis, trained, domain, curve):
        """Every trial's loss, method by method, against the number of training trajectories."""
        settings = [s for s in self.settings() if s.domain == domain]
        sizes = sorted({s.num_train for s in settings})
        width = 0.8 / len(imitation.METHODS)
        for k, method in enumerate(imitation.METHODS):
            for place, size in enumerate(sizes):
                (setting,) = (s for s in settings if (s.method, s.num_train) == (method, size))
                loss = np.maximum(at_best(trained[setting], curve), FLOOR)
                x = place + (k - 2) * width
                label = method if place == 0 else None
                axis.plot([x] * len(loss), loss, "o", color=COLORS[method], ms=4, alpha=0.7,
                          label=label)  # fmt: skip
                middle = np.median(loss)
                axis.plot([x - width / 3, x + width / 3], [middle] * 2, color=COLORS[method])
        axis.set(yscale="log", xlabel="training trajectories", title=f"{domain}, {curve} loss")
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])


class Figure4(Imitation):
    """Imitation of pendulum and cartpole by five methods (section 5.3)."""

    name = "fig4"

    def write(self, trained):
        settings = self.settings()
        self.save_csv(curve_rows(settings, trained, self.args.seed))
        domains = list(dict.fromkeys(s.domain for s in settings))
        figure, axes = _axes(1, len(domains), width=5.0)
        for axis, domain in zip(axes.flat, domains, strict=True):
            self.scatter(axis, trained, domain, "test")
        axes[0, 0].set_ylabel("imitation loss")
        axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        self.draw(figure)
        text = [
            "Test imitation loss E_x ‖u − û‖² (a sum over the 20 controls; the published code "
            "prints the mean, a twentieth) of each trial, at the epoch with its best validation "
            "loss. Errors are the median and the largest over the trials; of physics: the larger "
            "relative error of g/l and m·l² (pendulum), the largest of g, m_c, m_p and l "
            "(cartpole); of cost: the distance between the directions of (q, p). A cost is learned "
            "in the variables of the published code, q = sigmoid(logit) and p = √q ∘ p̂, which say "
            "the same as the text's ‖w_g ∘ (τ − τ_g)‖².",
            final_table(settings, trained),
            *self.claims(trained),
        ]
        self.save_text(text, trained)

    def claims(self, trained) -> list[str]:
        def get(domain, method, size, what=at_best):
            (setting,) = (s for s in self.settings() if s[:3] == (domain, method, size))
            run = trained[setting]
            return at_best(run, "test") if what is at_best else what(setting, run)

        lines = []
        for domain in dict.fromkeys(s.domain for s in self.settings()):
            for size in dict.fromkeys(s.num_train for s in self.settings()):
                network = get(domain, "nn", size)
                for method in ("sysid", *MPC):
                    ratio = network / np.maximum(get(domain, method, size), FLOOR)
                    lines.append(
                        [
                            *(domain, str(size), f"`{method}`"),
                            *(f"{np.median(ratio):.2g} ×", f"{np.min(ratio):.2g} ×"),
                            f"{np.sum(ratio >= 100)} of {len(ratio)}",
                        ]
                    )
        header = ["domain", "trajectories", "method", "below `nn`: median", "least", "100 × below"]
        return [
            'The paper: "in nearly every case we are able to directly optimize the imitation loss '
            "with respect to the controller and we significantly outperform a general neural "
            'network policy".',
            report.markdown(header, lines, left=1),
        ]


class Figure6(Imitation):
    """Train loss beside test loss of the runs of Figure 4 (appendix B)."""

    name = "fig6"

    def write(self, trained):
        settings = self.settings()
        rows = []
        for setting in settings:
            run = trained[setting]
            values = [best_epochs(run), *(at_best(run, name) for name in LOSSES)]
            for trial, (epoch, *losses) in enumerate(zip(*values, strict=True)):
                row = setting._asdict() | dict(seed=self.args.seed + trial, epoch=int(epoch))
                rows.append(row | dict(zip(LOSSES, losses, strict=True)))
        self.save_csv(rows)
        domains = list(dict.fromkeys(s.domain for s in settings))
        figure, axes = _axes(2, len(domains), width=5.0, sharey="col")
        for column, domain in zip(axes.T, domains, strict=True):
            for axis, curve in zip(column, ("train", "test"), strict=True):
                self.scatter(axis, trained, domain, curve)
        axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        self.draw(figure)
        header = ["domain", "trajectories", "method", "train, mean", "test, mean", "test / train"]
        lines = []
        for setting in settings:
            train, test = (np.mean(at_best(trained[setting], c)) for c in ("train", "test"))
            line = [setting.domain, str(setting.num_train), f"`{setting.method}`"]
            lines.append([*line, f"{train:.1e}", f"{test:.1e}", f"{test / train:.2g}"])
        text = [
            "Imitation loss at the epoch with the best validation loss, mean over the trials. The "
            "train loss is the mean over the minibatches of that epoch, each before its update.",
            report.markdown(header, lines, left=1),
        ]
        self.save_text(text, trained)


class Figure5(Figure):
    """An expert that no model of the learner's can be: damping and wind (section 5.4)."""

    name = "fig5"
    METHODS = ("sysid", "mpc.dx")

    def settings(self) -> list[Setting]:
        domains = ("damped pendulum", "damped pendulum as published")
        hidden = 16 if self.quick else imitation.HIDDEN
        return [
            Setting(domain, method, 10 if self.quick else 100, hidden=hidden)
            for domain in (domains[:1] if self.quick else domains)
            for method in self.METHODS
        ]

    def plans(self):
        return self.imitations(self.settings(), STARTS, EPOCHS_5)

    def write(self, trained):
        settings = self.settings()
        self.save_csv(curve_rows(settings, trained, self.args.seed))
        domains = list(dict.fromkeys(s.domain for s in settings))
        figure, axes = _axes(2, len(domains), width=5.0)
        names = dict(train="imitation loss, train", train_transition="next-state loss, train")
        for column, domain in zip(axes.T, domains, strict=True):
            for axis, (curve, label) in zip(column, names.items(), strict=True):
                for setting in (s for s in settings if s.domain == domain):
                    values = trained[setting].curves[curve]
                    lines = axis.plot(values, color=COLORS[setting.method], lw=0.8, alpha=0.7)
                    lines[0].set_label(setting.method)
                axis.set(yscale="log", title=f"{domain}: {label}", xlabel="epoch")
                axis.title.set_fontsize(9)
        axes[0, 0].legend(fontsize=8)
        self.draw(figure)
        header = ["expert", "method", "imitation, train", "imitation, test"]
        header += ["next state, train", "next state, test", "converged", "minutes"]
        lines = []
        for setting in settings:
            run = trained[setting]
            last = [run.curves[name][-1] for name in
                    ("train", "test", "train_transition", "test_transition")]  # fmt: skip
            lines.append(
                [setting.domain, f"`{setting.method}`"]
                + [f"{np.median(v):.3g} ({np.min(v):.3g} – {np.max(v):.3g})" for v in last]
                + [f"{np.mean(run.curves['converged']):.2%}", f"{run.seconds / 60:.1f}"]
            )
        text = [
            "After the last epoch: median (least – most) over the random starts. The text damps "
            "the rate; the published code's damping multiplies the angle, shown beside it.",
            report.markdown(header, lines, left=2),
            'The paper: "even though vanilla SysID is slightly better at optimizing the next-state '
            'transitions, it finds an inferior model for imitation".',
            *self.claims(trained),
        ]
        self.save_text(text, trained)

    def claims(self, trained) -> list[str]:
        lines = []
        for sysid in (s for s in self.settings() if s.method == "sysid"):
            runs = [trained[sysid].curves, trained[sysid._replace(method="mpc.dx")].curves]
            wins = [
                np.sum(runs[0][curve][-1] > runs[1][curve][-1])
                for curve in ("train", "test", "train_transition", "test_transition")
            ]
            num = runs[0]["train"].shape[1]
            lines.append([sysid.domain, *(f"{win} of {num}" for win in wins)])
        header = ["starts where `mpc.dx` ends below `sysid`", "imitation, train"]
        header += ["imitation, test", "next state, train", "next state, test"]
        return [report.markdown(header, lines)]


class Hessian(Figure):
    """The paper's Hessian in the backward pass, ∇²cost, beside the exact one, in the same runs."""

    name = "hessian"

    def settings(self) -> list[Setting]:
        hidden = 16 if self.quick else imitation.HIDDEN
        size = 10 if self.quick else 100
        methods = MPC[:1] if self.quick else MPC
        pairs = [("pendulum", method) for method in methods]
        if not self.quick:
            pairs += [("cartpole", method) for method in methods]
            pairs += [("damped pendulum", "mpc.dx")]
        return [
            Setting(domain, method, size, hessian, hidden)
            for domain, method in pairs
            for hessian in ("exact", "ilqr")
        ]

    def plans(self):
        damped = [s for s in self.settings() if s.domain == "damped pendulum"]
        others = [s for s in self.settings() if s.domain != "damped pendulum"]
        plans = self.imitations(others, TRIALS, EPOCHS)
        return plans | self.imitations(damped, STARTS, EPOCHS_5)

    def write(self, trained):
        settings = self.settings()
        self.save_csv(curve_rows(settings, trained, self.args.seed))
        pairs = list(dict.fromkeys((s.domain, s.method) for s in settings))
        columns = min(len(pairs), 3)
        figure, axes = _axes(math.ceil(len(pairs) / columns), columns)
        for axis in axes.flat[len(pairs) :]:
            axis.set_visible(False)
        for axis, pair in zip(axes.flat, pairs, strict=False):
            for setting in (s for s in settings if (s.domain, s.method) == pair):
                values = np.maximum(trained[setting].curves["test"], FLOOR)
                color = "C0" if setting.hessian == "exact" else "C3"
                lines = axis.plot(values, color=color, lw=0.7, alpha=0.7)
                lines[0].set_label(setting.hessian)
            axis.set(yscale="log", title=": ".join(pair), xlabel="epoch")
        axes[0, 0].set_ylabel("imitation loss, test")
        axes[0, 0].legend(fontsize=8)
        self.draw(figure)
        text = [
            "Test imitation loss, as in Figure 4, with the exact Hessian and with the paper's, "
            '∇²cost (`Options(backward_hessian="ilqr")`), in the backward pass. The solver\'s own '
            "steps, the data and all random numbers are the same.",
            final_table(settings, trained, with_hessian=True),
        ]
        self.save_text(text, trained)


# Section 5.2.


class Figure3(Figure):
    """Imitation of a linear-quadratic expert (section 5.2)."""

    name = "fig3"
    SMOOTH = 25  # iterations

    def settings(self) -> list[lqr.Setting]:
        text = lqr.Setting()
        published = lqr.Setting(lqr.PUBLISHED, batch=128)
        return [text] if self.quick else [text, published]

    def plans(self):
        seeds = [self.args.seed + k for k in range(2 if self.quick else STARTS)]
        iterations, chunk = (200, 5) if self.quick else (ITERATIONS, 50)
        return {
            setting: partial(lqr.run, setting, seeds, iterations, chunk)
            for setting in self.settings()
        }

    def smooth(self, run: Trained, name: str) -> np.ndarray:
        """Running means [iterations − 24, starts]."""
        total = np.cumsum(np.pad(run.curves[name].astype(float), ((1, 0), (0, 0))), axis=0)
        return (total[self.SMOOTH :] - total[: -self.SMOOTH]) / self.SMOOTH

    def write(self, trained):
        rows, settings = [], self.settings()
        for setting in settings:
            run = trained[setting]
            imitation, model = (self.smooth(run, name) for name in ("imitation", "model"))
            for start in range(imitation.shape[1]):
                for k in _thinned(len(imitation)):
                    row = dict(variant=setting.variant, seed=self.args.seed + start)
                    row |= dict(iteration=k + self.SMOOTH, imitation=imitation[k, start])
                    rows.append(row | dict(model=model[k, start]))
        self.save_csv(rows)
        figure, axes = _axes(2, len(settings), width=4.6)
        for column, setting in zip(axes.T, settings, strict=True):
            for axis, name in zip(column, ("imitation", "model"), strict=True):
                values = self.smooth(trained[setting], name)
                x = np.arange(len(values)) + self.SMOOTH
                axis.plot(x, values, lw=1.0)
                axis.set(yscale="log", xlabel="iteration", title=f"{name} loss, {setting.variant}")
        self.draw(figure)
        header = ["setting", "start", *(f"imitation at {k}" for k in self.marks(trained))]
        header += [f"model at {k}" for k in self.marks(trained)] + ["true model?", "converged"]
        lines, counts = [], []
        for setting in settings:
            run = trained[setting]
            values = {name: self.smooth(run, name) for name in ("imitation", "model")}
            found = values["model"][-1] < self.FOUND
            counts.append(f"{setting.variant}: {found.sum()} of {len(found)}")
            for start in range(len(found)):
                at = [values[name][k - self.SMOOTH, start]
                      for name in values for k in self.marks(trained)]  # fmt: skip
                lines.append(
                    [
                        *(setting.variant, str(start), *(f"{value:.2e}" for value in at)),
                        "yes" if found[start] else "no",
                        f"{np.mean(run.curves['converged'][:, start]):.2%}",
                    ]
                )
        text = [
            "Losses as the mean over 25 iterations. Imitation: E ‖τ − τ̂‖², a sum over 5 stages "
            "and 6 numbers; model: the mean of (θ − θ̂)². The text: bounds ±1, the identity as "
            "cost, batches of 32. Its published code differs: no bounds, a random linear term in "
            "the cost, batches of 128 (and a loss that is a fifteenth of this one).",
            report.markdown(header, lines, left=1),
            'The paper: "The model converges to the true parameters in half of the trials and '
            'achieves a perfect imitation loss. The other trials get stuck in a local minimum". '
            f"Here (model loss below {self.FOUND:g}): {'; '.join(counts)}.",
        ]
        self.save_text(text, trained)

    FOUND = 1e-2  # of the model loss at the end

    def marks(self, trained) -> list[int]:
        """Iterations of the table: the paper's thousand, and the last."""
        num = len(next(iter(trained[s] for s in self.settings())).curves["model"])
        return [1000, num] if num > 1000 else [num]


class Figure2(Figure):
    """Fixed-point against unrolled differentiation (section 5.1): `python -m bench fixed_point`."""

    name = "fig2"

    def plans(self):
        return {}

    COLUMNS = (
        *("contender", "k", "work", "median_s", "min_s", "max_s", "temporary_bytes"),
        *("residual_bytes", "iterations_mean", "kkt_residual_worst", "gradient_error_median"),
    )

    def write(self, trained):
        study = report.RESULTS  # of the speed benchmark, where it was run
        if self.quick or not (study / "fixed_point.jsonl").exists():
            study = self.output
            quick = ["--quick"] if self.quick else []
            seed = ["--seed", str(self.args.seed)]
            bench.__main__.main(["fixed_point", "--output", str(study), *seed, *quick])
        lines = (study / "fixed_point.jsonl").read_text(encoding="utf-8").splitlines()
        self.save_csv([{k: json.loads(line).get(k) for k in self.COLUMNS} for line in lines])
        shutil.copy(study / "fixed_point.png", self.output / f"{self.name}.png")
        table = (study / "fixed_point.md").read_text(encoding="utf-8").strip()
        claim = (
            'The paper: "significantly more efficient in the backward pass, especially when a '
            'large number of iLQR iterations are needed. The backward pass is essentially free".'
        )
        report.save_text(self.output, self.name, f"{claim}\n\n{table}")


FIGURES = (Figure2, Figure3, Figure4, Figure5, Figure6, Hessian)
