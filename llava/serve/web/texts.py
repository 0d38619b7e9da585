"""What the web page says before and around a conversation (Markdown and HTML)."""

TITLE = "LLaVA-Med"
NOTICE = """## Before you begin

This is a research demonstration. **It is not a medical device.** Answers can be wrong, incomplete or invented, also
where they sound certain. Don't use them for diagnosis, treatment or any other clinical decision.

Don't upload images or texts that could identify a patient."""
WAITING = """## No model is ready yet

The page looks for one every few seconds and opens by itself. Whoever runs this server starts a model with

    llava-med worker --model-path CHECKPOINT"""
HEADING = f"<strong>{TITLE}</strong> <span>Research only, never for clinical use.</span>"
KEYS = """<h2>Keys</h2><dl><dt>Enter</dt><dd>send the question</dd><dt>Escape</dt><dd>stop the answer; close this</dd>
<dt>Alt ← / →, or ← / → outside the question</dt><dd>previous, next image</dd>
<dt>↑ / ↓ outside the question, or the wheel</dt><dd>slices of a scan</dd>
<dt>+ / − / 0 outside the question, or Ctrl and the wheel</dt><dd>zoom, fit; drag to move, double click to fit</dd>
<dt>m</dt><dd>the image as the model sees it</dd></dl>"""
