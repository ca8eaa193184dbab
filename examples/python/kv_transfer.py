#!/usr/bin/env python3
"""KV cache from prefill to decode: paged blocks of many layers, block lists in random order, heads split across different
tensor-parallel sizes, a notification when a request is complete, every byte verified.

  python examples/python/kv_transfer.py --prefill_tp 2 --decode_tp 1 --layers 16 --requests 4
  python examples/python/kv_transfer.py --device cuda --pull          (needs torch with CUDA; CPU memory otherwise)

Every rank is a process of its own; the pipes between them carry only cards (metadata) and the word to stop.
"""

import argparse
import multiprocessing
import os
import pathlib
import sys
import time

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations"))

import numpy  # noqa: E402

LIMIT_S = 120


def wanted(request, layer, plane, heads, tokens, dim):
    """The values of one plane of one layer, [heads, tokens, dim]: every element tells where it belongs."""
    seed = numpy.uint32(request * 7919 + layer * 131 + plane * 17 + 1)
    head, token, place = numpy.meshgrid(heads, tokens, numpy.arange(dim), indexing="ij", copy=False)
    mixed = (head * 2654435761 + token * 40503 + place * 65599).astype(numpy.uint32) * seed
    return (mixed >> numpy.uint32(13)).astype(numpy.uint16)


def make_cache(options, rank, size, page, blocks):
    """The layers of one rank as [2, blocks, heads, page, dim], 16-bit, and the KVCache over them."""
    from nixl_integrations.kv_transfer import KVCache

    shape = (2, blocks, options.heads // size, page, options.dim)
    if options.device == "cuda":
        import torch

        device = rank % torch.cuda.device_count()
        layers = [torch.zeros(shape, dtype=torch.int16, device=f"cuda:{device}") for _ in range(options.layers)]
    else:
        layers = [numpy.zeros(shape, dtype=numpy.uint16) for _ in range(options.layers)]
    return layers, KVCache(layers, rank, size)


def to_host(layer):
    return layer if isinstance(layer, numpy.ndarray) else layer.cpu().numpy().view(numpy.uint16)


def store(layer, values):
    if isinstance(layer, numpy.ndarray):
        layer[...] = values
    else:
        import torch

        layer.copy_(torch.from_numpy(values.view(numpy.int16)))
        torch.cuda.synchronize()


def shuffled_blocks(pool, count, seed):
    return numpy.random.default_rng(seed).permutation(pool.take(count))


def heads_of(options, rank, size):
    share = options.heads // size
    return numpy.arange(rank * share, (rank + 1) * share)


def agent_of(name):
    import nixl

    return nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))


def fill(options, layers, rank, block_ids_of):
    """What prefill would compute: the values of every request in its blocks."""
    page, heads = options.prefill_page, heads_of(options, rank, options.prefill_tp)
    for index, layer in enumerate(layers):
        values = to_host(layer).copy()
        for request, block_ids in block_ids_of.items():
            for plane in range(2):
                data = wanted(request, index, plane, heads, numpy.arange(len(block_ids) * page), options.dim)
                values[plane, block_ids] = data.reshape(len(heads), len(block_ids), page, -1).swapaxes(0, 1)
        store(layer, values)


def first_wrong(options, layers, rank, request, block_ids):
    """Text naming the first wrong element of a request, or None."""
    page, heads = options.decode_page, heads_of(options, rank, options.decode_tp)
    for index, layer in enumerate(layers):
        values = to_host(layer)
        for plane in range(2):
            seen = values[plane, block_ids].swapaxes(0, 1).reshape(len(heads), len(block_ids) * page, -1)[:, :options.tokens]
            right = wanted(request, index, plane, heads, numpy.arange(options.tokens), options.dim)
            if not numpy.array_equal(seen, right):
                head, token, place = numpy.argwhere(seen != right)[0]
                return f"request {request}, layer {index}, {'KV'[plane]}, head {heads[head]}, token {token}, element {place}"
    return None


def prefill(options, rank, pipe):
    from nixl_integrations.kv_transfer import BlockPool, KVSender

    pages = -(-options.tokens // options.prefill_page)
    blocks = max(options.blocks, pages * options.requests)
    layers, cache = make_cache(options, rank, options.prefill_tp, options.prefill_page, blocks)
    pool = BlockPool(blocks)
    sender = KVSender(agent_of(f"prefill-{rank}"), cache, pool)
    block_ids_of = {request: shuffled_blocks(pool, pages, [rank, request]) for request in range(options.requests)}
    fill(options, layers, rank, block_ids_of)
    pipe.send((sender.card(), {request: ids.tolist() for request, ids in block_ids_of.items()}))
    for card in pipe.recv():
        sender.connect(card)
    if not options.pull:
        for request, block_ids in block_ids_of.items():
            push = sender.push(block_ids, f"request-{request}", LIMIT_S)
            push.wait(LIMIT_S)
            print(f"prefill {rank}: request {request} pushed, {push.total_bytes / 1e6:.1f} MB, "
                  f"{push.gigabytes_per_s():.2f} GB/s", flush=True)
        if pool.num_free != blocks:
            raise RuntimeError(f"prefill {rank}: {pool.num_free} of {blocks} blocks came back to the pool")
    pipe.send("done")
    pipe.recv()
    sender.close()


def decode(options, rank, pipe):
    from nixl_integrations.kv_transfer import BlockPool, KVReceiver

    pages = -(-options.tokens // options.decode_page)
    blocks = max(options.blocks, pages * options.requests)
    layers, cache = make_cache(options, rank, options.decode_tp, options.decode_page, blocks)
    pool = BlockPool(blocks)
    receiver = KVReceiver(agent_of(f"decode-{rank}"), cache, pool)
    pipe.send((receiver.card(), None))
    sources = {}
    for card, block_ids_of in pipe.recv():
        sources[receiver.connect(card)] = block_ids_of
    ids = {request: shuffled_blocks(pool, pages, [100 + rank, request]) for request in range(options.requests)}
    if not options.pull:
        for request in ids:
            receiver.open(f"request-{request}", ids[request], options.tokens)
    for request in ids:
        if options.pull:
            theirs = {name: of[request] for name, of in sources.items()}
            pull = receiver.pull(f"request-{request}", ids[request], theirs, options.tokens)
            pull.wait(LIMIT_S)
            print(f"decode {rank}: request {request} pulled, {pull.total_bytes / 1e6:.1f} MB, "
                  f"{pull.gigabytes_per_s():.2f} GB/s", flush=True)
        else:
            receiver.wait(f"request-{request}", LIMIT_S)
        wrong = first_wrong(options, layers, rank, request, ids[request])
        if wrong:
            raise RuntimeError(f"decode {rank}: wrong value at {wrong}")
        print(f"decode {rank}: request {request} of {options.requests} complete and verified", flush=True)
    pipe.send("done")
    pipe.recv()
    receiver.close()


def rank_main(role, options, rank, pipe):
    try:
        (prefill if role == "prefill" else decode)(options, rank, pipe)
    except EOFError:
        sys.exit(f"{role} {rank}: another rank failed")


def receive(process, pipe, limit_s):
    """The next word of a rank; RuntimeError when it died or is late."""
    deadline = time.monotonic() + limit_s
    while not pipe.poll(0.1):
        if not process.is_alive() and not pipe.poll(0):
            raise RuntimeError(f"{process.name} ended with {process.exitcode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.name} did nothing within {limit_s} s")
    return pipe.recv()


def main(argv=None):
    options = parse(argv)
    context = multiprocessing.get_context("spawn")
    ranks = []
    for role, size in (("prefill", options.prefill_tp), ("decode", options.decode_tp)):
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(role, options, rank, theirs), name=f"{role} {rank}")
            process.start()
            theirs.close()
            ranks.append((role, process, ours))
    try:
        cards = {(role, process.name): receive(process, pipe, LIMIT_S) for role, process, pipe in ranks}
        start = time.perf_counter()
        for role, process, pipe in ranks:
            others = [card for (other, _), card in cards.items() if other != role]
            pipe.send([card for card, _ in others] if role == "prefill" else others)
        for _, process, pipe in ranks:
            receive(process, pipe, LIMIT_S)
        seconds = time.perf_counter() - start
        for _, _, pipe in ranks:
            pipe.send("stop")
        for _, process, _ in ranks:
            process.join(LIMIT_S)
        total = options.requests * options.tokens * options.layers * 2 * options.heads * options.dim * 2
        print(f"{options.requests} requests, {total / 1e9:.3f} GB in {seconds:.2f} s with connecting and verifying: all right")
        return 0
    except RuntimeError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    finally:
        for _, process, _ in ranks:
            if process.is_alive():
                process.kill()


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; 1 or more is needed")
    return number


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value, text in (
            ("prefill_tp", 2, "prefill ranks"), ("decode_tp", 1, "decode ranks"), ("layers", 8, "layers"),
            ("heads", 8, "heads of all ranks"), ("dim", 128, "elements of a head"), ("tokens", 500, "tokens of a request"),
            ("requests", 3, "requests"), ("blocks", 64, "blocks of a cache, at least"),
            ("prefill_page", 16, "tokens of a block"), ("decode_page", 16, "tokens of a block")):
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"{text} (default {value})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pull", action="store_true", help="decode reads instead of prefill writing")
    options = parser.parse_args(argv)
    for size in (options.prefill_tp, options.decode_tp):
        if options.heads % size:
            parser.error(f"{options.heads} heads cannot be split over {size} ranks")
    return options


if __name__ == "__main__":
    sys.exit(main())
