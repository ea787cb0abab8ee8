"""Text as LaTeX source, for a document in UTF-8."""

from __future__ import annotations

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    **{char: f"\\{char}" for char in "&%$#_"},
}
_SYMBOLS = {
    "‖": r"$\|$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\rightarrow$",
    "∝": r"$\propto$",
    "Σ": r"$\Sigma$",
    "…": r"\ldots{}",
    "–": "--",
    "’": "'",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
}
_TABLE = str.maketrans(_SPECIAL | _SYMBOLS)


def escape(text: str) -> str:
    """Returns the text as LaTeX prints it: special characters escaped, symbols as mathematics, other letters as they are."""
    return text.translate(_TABLE)


def table(rows: list[tuple[str, str]], caption: str, label: str) -> str:
    """Returns a floating table of two columns with the rules of the package booktabs."""
    body = "\n".join(f"  {escape(name)} & {escape(value)} \\\\" for name, value in rows)
    return (
        "\\begin{table}[t]\n\\centering\n\\small\n"
        f"\\caption{{{escape(caption)}}}\n\\label{{{label}}}\n"
        "\\begin{tabular}{@{}lp{0.65\\linewidth}@{}}\n  \\toprule\n"
        f"{body}\n  \\bottomrule\n\\end{{tabular}}\n\\end{{table}}"
    )
