"""Several tokens of a picture in one step, and the same picture: drafts with fixed noise.

A step feeds a row's last token and k drafts. Every position is sampled with the noise that drawing one by one
would use there (``windows.noise``), and the longest run of samples whose inputs were right stands: Jacobi
iteration with a Gumbel-coupled draw. No draft probabilities, no second model, and the seed's picture depends
on nothing but the seed. Sources: Predictive Sampling (arXiv 2002.09928), drafter-invariant speculative
decoding (2408.07978), Gumbel coupling (2510.24211); docs/windows.md has the method and figures.
"""
