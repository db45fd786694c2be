"""The report of tests/gpu/run as Markdown."""


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def number(value, digits=1):
    return "–" if value is None else f"{value:.{digits}f}"


def outcome(step):
    if step["passed"] is None:
        return f"not run: {step.get('why_not', '')}" + (" (**required**)" if step["required"] else "")
    return "passed" if step["passed"] else f"**FAILED** ({step.get('status')})"


def perf(name, result):
    """Rows of `context-parallel perf --json`: rates are of one GPU that all virtual ranks share, so ranks × rate of a rank."""
    rows = []
    for row in result["rows"]:
        ranks = 1 if row["comm"] == "one rank" else result["ranks"]
        cells = [row["comm"], ranks]
        for way in ("forward", "backward"):
            part = row[way]
            versus = part.get("versus_one_rank")
            cells += [number(part["seconds"] * 1e3, 3), number(part["gflops_per_rank"] * ranks / 1e3), "–" if versus is None or ranks == 1 else f"{100 * (1 / versus - 1):+.1f} %"]
        rows.append(cells)
    head = ["exchange", "ranks", "forward ms", "TFLOP/s", "cost", "backward ms", "TFLOP/s", "cost"]
    problem = result["problem"]
    mask = "causal" if problem["causal"] else "full"
    title = f"{problem['heads']}:{problem['kv_heads']} heads, D = {problem['head_dim_qk']}, S = {result['rows'][0]['seq']}, {mask}, {problem['dtype']}, median of {result['iters']}"
    return ["", f"## {name}: {title}", "", *table(head, rows)]


def baseline(result):
    rows = []
    for row in result["rows"]:
        case = [row["kernel"], f"{row['heads']}:{row['kv_heads']}", row["dim"], row["seq"], "causal" if row["causal"] else "full"]
        figures = [row["why_not"], "", "", ""] if "why_not" in row else [number(row[k], d) for k, d in (("forward_ms", 3), ("forward_tflops", 1), ("backward_ms", 3), ("backward_tflops", 1))]
        rows.append(case + figures)
    head = ["kernel", "heads", "D", "S", "mask", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s"]
    return ["", f"## Instead: torch {result['torch']}, cuDNN {result['cudnn']}, bf16, one GPU", "", *table(head, rows)]


def markdown(whole):
    machine, results = whole["machine"], whole["results"]
    lines = [f"# {whole['device']}, {whole['when']}", ""]
    if whole["dry_run"]:
        lines += ["**A dry run on the software GPU: it proves the script. No figure here says anything about a GPU.**", ""]
    smi = machine.get("nvidia_smi")
    lines += [f"Commit {whole['pack']['commit']}, packed {whole['pack']['packed']}. {whole['seconds']:.0f} s in all."]
    lines += ["Machine: " + "; ".join(f"{k} {v}" for k, v in smi.items()) + "."] if isinstance(smi, dict) else []
    totals = [f"{way} {t['passed']} passed, {t['failed']} failed" for way, t in results["tests"].items() if t]
    lines += [f"Rust tests on CUDA, seed {whole['seed']}: {'; '.join(totals) or 'none'}."]
    lines += ["", *table(["step", "outcome", "s"], [[name, outcome(step), step["seconds"]] for name, step in whole["steps"].items()])]
    for name, result in results.items():
        if name.startswith("perf"):
            lines += perf(name, result)
    if "baseline" in results:
        lines += baseline(results["baseline"])
    return "\n".join(lines) + "\n"
