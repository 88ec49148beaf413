"""The operator's side: what is delivered, what waits and why, and the buttons. The API and the console."""
