"""The paper's findings, asked of one's own data: which runs answer them, their execution, and what came out."""
