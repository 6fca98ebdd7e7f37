"""How dense pages are."""

from __future__ import annotations

import density

PAGE = """<html><nav><p>Not counted.</p></nav><article>
<h1>1. A title<a class="headerlink" href="#a">#</a></h1>
<p>At rank <span class="pasted-text">2.5</span> nearly <em>42</em> % are
lost, by <a class="reference" href="#b">Theorem 3.1</a> and <code>f(7)</code>.</p><p>The
model's <span class="math">\\(k = 4\\)</span> bends.</p>
<ul><li><p>One thing</p></li><li>1,024 more</li></ul>
<div class="cell"><p>Output 9</p></div>
<table><tr><td><p>8</p></td></tr></table>
<figure><figcaption><p>Figure 5</p></figcaption></figure>
<div class="admonition"><p class="admonition-title">Theorem 6</p><p>So it is.</p></div>
<div class="admonition"><p class="admonition-title">Solution</p><pre>1 + 1</pre></div>
</article></html>"""


def test_prose_is_what_paragraphs_and_lists_say() -> None:
    # At rank 2.5 nearly 42 % are lost, by and. The model's bends. One thing. 1,024 more. So it is.
    found = density.measure(PAGE)
    assert found == density.Density(words=19, numbers=3, figures=1, exercises=1)
    assert found.per_100 == 100 * 3 / 19
