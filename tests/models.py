"""Small models that several tests take."""

from torch import nn


class Residual(nn.Module):
    def __init__(self, channels, out, stride=1, activation=nn.ReLU):
        super().__init__()
        self.activation = activation()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = None
        if stride != 1 or channels != out:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.activation(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.activation(y + (x if self.down is None else self.down(x)))


def resnet(width=8, classes=10, channels=1, activation=nn.ReLU):
    """ResNet-18 in shape: a stem, four stages of two blocks, each but the first at half the size."""
    layers = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation()]
    for stage in range(4):
        into, out = width * 2 ** max(stage - 1, 0), width * 2**stage
        layers += [Residual(into, out, 1 if stage == 0 else 2, activation), Residual(out, out, 1, activation)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 8, classes))


class CharacterModel(nn.Module):
    """Predicts the next character."""

    def __init__(self, characters, hidden=64):
        super().__init__()
        self.embed = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])
