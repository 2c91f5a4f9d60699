"""The paper's training recipe: corpus, target, distilled draft, n-gram table."""
