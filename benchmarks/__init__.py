"""Speed measured side by side on one machine: ``make bench``, or ``python -m benchmarks [--quick] [--only NAME …]``.

    __main__           runs the subjects, prints their tables, writes benchmarks/results/latest.json
    inner_loop         one worker on one core against a plain autograd loop and against ``higher`` (both in sequential)
    scaling            workers through Ray (fleet) against the same work in bare processes (bare)
    coordinator_share  how much of the workers' time the coordinator wastes (fleet)
    sampler            episodes a second on one core
    store              opening an episode store, and the memory of four workers on one
    report             what a subject gives back: sheets of numbers and floors
    rounds             interleaved measurement and its spread
    machine            where it was measured
    workload           the training job that scaling and coordinator_share run

Two things are compared by the ratios of interleaved rounds (A B A B …), never one after the other: other load on the
machine then hits both. Everything computes with one thread. Subjects know nothing of each other.
"""
