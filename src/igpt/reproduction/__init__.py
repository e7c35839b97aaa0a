"""The paper's experiments on images of one's own: the steps, their execution, and the answers."""
