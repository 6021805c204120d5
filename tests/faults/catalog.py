"""The faults that this project promises to survive, each with what must happen."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    number: int
    name: str
    expected: str


FAULTS = (
    Fault(1, "stopped and resumed", "adapter, optimizer and log equal an uninterrupted run's, bit for bit"),
    Fault(2, "the same with dropout, packing, DPO", "equal, bit for bit"),
    Fault(3, "moments in fp32 beside bf16 parameters", "moments keep type and bits"),
    Fault(4, "resumed with another number of processes", "the same order, or a refusal"),
    Fault(5, "resumed with another number of workers", "the order depends on the seed alone"),
    Fault(6, "resumed with an edited recipe", "another job is refused with its keys; rate and steps are noticed"),
    Fault(7, "resumed when finished", "the result again, no file touched"),
    Fault(8, "resumed after 10^6 examples", "the first step comes within twice a cold start"),
    Fault(9, "--resume with a mistyped path", "an error, nothing made"),
    Fault(10, "SIGTERM or SIGINT at random moments", "143 or 130, and resuming equals never stopped"),
    Fault(11, "SIGKILL at any point of a save", "the newest whole checkpoint is gone on from, leftovers go"),
    Fault(12, "SIGKILL of one of several processes", "the others end within a time limit"),
    Fault(13, "SIGTERM to one of several processes", "all stop at the same step"),
    Fault(14, "a dead master port", "a message, no hang"),
    Fault(15, "two runs into one folder", "the second is refused with process and host; a stale lock is taken over"),
    Fault(16, "disk full during a save", "earlier checkpoints stay, bytes needed and free told; looked at beforehand"),
    Fault(17, "temporary folder full", "saving needs none"),
    Fault(18, "output read-only, a file, without parent", "refused in less than a second, before data and model"),
    Fault(19, "fsync or rename fails", "a failed save, never reported as saved"),
    Fault(20, "merge interrupted", "no output at all; nothing that loads"),
    Fault(21, "tensors cut off at any boundary", "refused with file and sizes; the checkpoint before is taken"),
    Fault(22, "hostile safetensors headers", "refused at once, nothing large allocated"),
    Fault(23, "one bit flipped", "sha256 mismatch"),
    Fault(24, "manifest missing, broken or newer", "skipped with a notice; named outright, refused"),
    Fault(25, "adapter of another base", "refused with the first five tensors; of equal shapes, with both names"),
    Fault(26, "NaN in an adapter", "merge refuses it, no output"),
    Fault(27, "pickles beside what is read", "never opened"),
    Fault(28, "a model with code of its own", "refused without --trust-remote-code; no recipe can set it"),
    Fault(29, "YAML that would run code", "refused with its line"),
    Fault(30, "YAML bombs", "refused at once"),
    Fault(31, "mistakes in a recipe", "all told, each at its place, with the nearest key"),
    Fault(32, "names that lead out of a folder", "refused"),
    Fault(33, "output with shell characters", "a plain path, nothing run"),
    Fault(34, "hostile chat templates", "refused in one line, within bounds"),
    Fault(35, "offline, and secrets", "no connection for local files; no token in any file"),
    Fault(36, "broken data files", "file:line: reason"),
    Fault(37, "broken rows", "counted, skipped or refused; never a loss of 0 or NaN"),
    Fault(38, "tokenizer beyond the embedding, pad = eos", "refused beforehand; eos stays a label"),
    Fault(39, "data changed, cache damaged", "refused; made anew"),
    Fault(40, "fewer rows than a batch", "works, or one line"),
    Fault(41, "NaN in loss or gradient", "no update; stopped with the rows named, or a few steps skipped"),
    Fault(42, "NaN in the log", "written, not filtered"),
    Fault(43, "out of memory", "the levers, and a run to go on with"),
    Fault(44, "training stands still", "stopped with likely causes"),
    Fault(45, "4 x 1 against 1 x 4", "equal by token"),
    Fault(46, "the same recipe twice", "equal bits on the CPU, whatever else runs or was kept; a notice elsewhere"),
)
NUMBERS = {fault.number: fault for fault in FAULTS}
