from gptsmith.data.order import EpochOrder


def test_epoch_has_every_item_once_in_a_new_order() -> None:
    order = EpochOrder(20, seed=3)
    epochs = [[order.item(20 * epoch + i) for i in range(20)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [EpochOrder(20, seed=4).item(i) for i in range(20)] != epochs[0]


def test_order_is_a_function_of_the_index() -> None:
    whole = [EpochOrder(7, seed=1).item(i) for i in range(30)]
    order = EpochOrder(7, seed=1)
    assert [order.item(i) for i in (29, 0, 13, 14)] == [whole[i] for i in (29, 0, 13, 14)]


def test_position_has_epoch_and_index() -> None:
    expected = {"seed": 3, "epoch": 2, "index": 4, "per_epoch": 20}
    assert EpochOrder(20, seed=3).position(44) == expected
